"""Instructions whose keeping a program can check, in the manner of IFEval.

After Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models"
(https://arxiv.org/abs/2311.07911). A rule is a record such as `{"rule": "words_at_least", "n": 9}`;
`instruction_rules.RULES` has them all. Records of IFEval itself are read too. Differences from its
own program: sentences are told by their marks rather than by a trained model, a language by its
script alone, and keywords are text rather than regular expressions.
"""

import difflib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxllm.errors import UserError
from jaxllm.evaluation.instruction_rules import LANGUAGES, RULES


def check(rules: Sequence[Mapping[str, Any]], response: str) -> list[bool]:
    """Whether a response keeps to each of the rules; one of white space keeps to none.

    Raises:
        UserError: a rule is unknown, or a parameter is missing, unknown or of another type.
    """
    return [bool(response.strip()) & rule(response) for rule in _checked(rules)]


def check_loosely(rules: Sequence[Mapping[str, Any]], response: str) -> list[bool]:
    """`check`, with a rule kept if some part of the response keeps to it: all of it or without its
    first line, its last line or both, as it is or without asterisks (Zhou et al. 2023, section 2).

    Raises:
        UserError: as `check`.
    """
    lines = response.split("\n")
    parts = [lines, lines[1:], lines[:-1], lines[1:-1]]
    texts = [response, *("\n".join(part).strip() for part in parts[1:])]
    texts += [text.replace("*", "") for text in texts]
    return [any(kept) for kept in zip(*(check(rules, text) for text in texts), strict=True)]


def rules_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rules of a record, checked: its `rules`, or IFEval's `instruction_id_list` and `kwargs`.

    Raises:
        UserError: it has neither, no rule at all, or as `check`.
    """
    if "rules" in record:
        rules = record["rules"]
    elif "instruction_id_list" in record:
        names, given = record["instruction_id_list"], record.get("kwargs", ())
        if not (_is_list(names) and _is_list(given) and len(names) == len(given)):
            raise UserError("kwargs: must be a list with an object for each instruction.")
        rules = [_from_ifeval(name, k) for name, k in zip(names, given, strict=True)]
    else:
        raise UserError("rules: are missing; give them as a list, or IFEval's instruction_id_list.")
    if not _is_list(rules) or not rules:
        raise UserError("rules: must be a list of one rule or more.")
    list(_checked(rules))
    return [dict(rule) for rule in rules]


def _checked(rules: Sequence[Any]) -> Iterator[Callable[[str], bool]]:
    """Each rule as a function of the response.

    Raises:
        UserError: as `check`.
    """
    for place, given in enumerate(rules):
        where = f"rules[{place}]"
        if not isinstance(given, Mapping) or not isinstance(given.get("rule"), str):
            raise UserError(f"{where}: must be an object with a `rule`; was {given!r}.")
        name = given["rule"]
        if name not in RULES:
            raise UserError(f"{where}: there is no rule {name!r}; {_near(name)}")
        rule, parameters = RULES[name], {k: v for k, v in given.items() if k != "rule"}
        if parameters.keys() != rule.parameters.keys():
            needed = ", ".join(rule.parameters) or "none"
            raise UserError(
                f"{where}: {name} takes the parameters {needed}, and was given "
                f"{', '.join(parameters) or 'none'}."
            )
        for key, kind in rule.parameters.items():
            if not _is_of(kind, parameters[key]):
                found = parameters[key]
                raise UserError(
                    f"{where}.{key}: {name} takes {_KINDS[kind]}, and was given {found!r}."
                )
        if name == "language" and parameters["language"] not in LANGUAGES:
            raise UserError(
                f"{where}.language: {parameters['language']!r} is unknown; known are "
                f"{', '.join(LANGUAGES)}."
            )
        if "letter" in parameters and len(parameters["letter"].casefold()) != 1:
            raise UserError(f"{where}.letter: {parameters['letter']!r} is not one letter.")
        yield functools.partial(rule.holds, **parameters)


_KINDS = {
    int: "a whole number from 0",
    str: "a text that is not empty",
    list: "a list of texts that are not empty",
}


def _is_of(kind: type, value: Any) -> bool:
    if kind is int:
        return type(value) is int and value >= 0
    if kind is list:
        return _is_list(value) and bool(value) and all(_is_of(str, inner) for inner in value)
    return isinstance(value, str) and bool(value.strip())


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _near(name: str) -> str:
    near = difflib.get_close_matches(name, RULES, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(RULES)}."


_Given = Mapping[str, Any]


def _counted(name: str, number: str, relation: str = "relation", **others: str) -> Callable:
    """The rule of a count that IFEval gives as a number and `less than` or `at least`."""

    def made(given: _Given) -> dict[str, Any]:
        n, how = given[number], given.get(relation, "at least")
        if how not in ("less than", "at least") or type(n) is not int:
            raise UserError(f"kwargs: {number}={n!r} with {relation}={how!r} says no number.")
        # `less than 0` is kept by nothing; `at most -1` would be no number.
        rule = f"{name}_at_most" if how == "less than" else f"{name}_at_least"
        n = max(0, n - 1) if how == "less than" else n
        return {"rule": rule, "n": n} | {key: given[theirs] for key, theirs in others.items()}

    return made


def _named(rule: str, **parameters: str) -> Callable[[_Given], dict[str, Any]]:
    return lambda given: {"rule": rule} | {key: given[theirs] for key, theirs in parameters.items()}


_ANSWERS = ["My answer is yes.", "My answer is no.", "My answer is maybe."]

_IFEVAL: dict[str, Callable[[_Given], dict[str, Any]]] = {
    "keywords:existence": _named("keywords", keywords="keywords"),
    "keywords:frequency": _counted("keyword", "frequency", keyword="keyword"),
    "keywords:forbidden_words": _named("forbidden", words="forbidden_words"),
    "keywords:letter_frequency": _counted(
        "letter", "let_frequency", "let_relation", letter="letter"
    ),
    "language:response_language": _named("language", language="language"),
    "length_constraints:number_sentences": _counted("sentences", "num_sentences"),
    "length_constraints:number_paragraphs": _named(
        "starred_paragraphs_exactly", n="num_paragraphs"
    ),
    "length_constraints:number_words": _counted("words", "num_words"),
    "length_constraints:nth_paragraph_first_word": _named(
        "paragraph_begins", n="num_paragraphs", place="nth_paragraph", word="first_word"
    ),
    "detectable_content:number_placeholders": _named("placeholders_at_least", n="num_placeholders"),
    "detectable_content:postscript": _named("postscript", marker="postscript_marker"),
    "detectable_format:number_bullet_lists": _named("bullets_exactly", n="num_bullets"),
    "detectable_format:constrained_response": lambda given: {"rule": "one_of", "options": _ANSWERS},
    "detectable_format:number_highlighted_sections": _named(
        "highlights_at_least", n="num_highlights"
    ),
    "detectable_format:multiple_sections": _named(
        "sections_at_least", n="num_sections", heading="section_spliter"
    ),
    "detectable_format:json_format": _named("json"),
    "detectable_format:title": _named("title"),
    "combination:two_responses": _named("two_responses"),
    "combination:repeat_prompt": _named("starts_with", phrase="prompt_to_repeat"),
    "startend:end_checker": _named("ends_with", phrase="end_phrase"),
    "startend:quotation": _named("quoted"),
    "change_case:capital_word_frequency": _counted(
        "capital_words", "capital_frequency", "capital_relation"
    ),
    "change_case:english_capital": _named("uppercase"),
    "change_case:english_lowercase": _named("lowercase"),
    "punctuation:no_comma": _named("no_commas"),
}
"""Each of IFEval's instructions as a rule of ours, made of its own parameters."""


def _from_ifeval(name: Any, given: Any) -> dict[str, Any]:
    if name not in _IFEVAL:
        raise UserError(f"instruction_id_list: {name!r} is none of IFEval's instructions.")
    if not isinstance(given, Mapping):
        raise UserError(f"kwargs: must be an object for {name}; was {given!r}.")
    try:
        return _IFEVAL[name](given)
    except KeyError as error:
        raise UserError(f"kwargs: {name} needs {error.args[0]}, which is missing.") from None
