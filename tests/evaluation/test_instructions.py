"""Checkable instructions: every rule kept and broken, mistakes told, IFEval's records read."""

import json
import time
from pathlib import Path

import pytest

import jaxllm.evaluation
from jaxllm.errors import UserError
from jaxllm.evaluation.instruction_rules import RULES
from jaxllm.evaluation.instructions import check, check_loosely, rules_of

PROMPTS = Path(jaxllm.evaluation.__file__).parent / "instruction_prompts.jsonl"

# A rule without `_at_least`, `_at_most` and `_exactly`, a response, and how many it holds.
COUNTS = [
    ("words", {}, "One, two-three 4.", 4),
    ("words", {}, "你好，world 世界", 5),
    ("sentences", {}, 'He said "Go!" Then 3.5 left... And?', 3),
    ("sentences", {}, "你好。再见！真的？", 3),
    ("sentences", {}, "no mark", 1),
    ("paragraphs", {}, "a\nb\n\n c\n \n\nd\n", 3),
    ("starred_paragraphs", {}, "a\n***\nb *** c", 3),
    ("starred_paragraphs", {}, "a\n***\n***\nb", 0),
    ("bullets", {}, "* a\n  - b\n• c\n** d **\n--\n1. e", 3),
    ("placeholders", {}, "[name], [a [b] [] [c\nd]", 3),
    ("highlights", {}, "*a* **b c** * no * and *d", 2),
    ("sections", {"heading": "Section"}, "Section 1 a\nSection2 b\nSection x", 2),
    ("capital_words", {}, "A LOUD Word IS-IT 7", 3),
    ("keyword", {"keyword": "Cat"}, "cat, CATS, dog", 2),
    ("letter", {"letter": "E"}, "Eel here", 4),
]

# Rule, a response that keeps to it, one that does not.
OTHERS = [
    ({"rule": "keywords", "keywords": ["Sun", "月"]}, "sunny 月光", "sunny"),
    ({"rule": "forbidden", "words": ["art", "c++"]}, "party", "no ART."),
    ({"rule": "forbidden", "words": ["月"]}, "日", "明月光"),
    ({"rule": "json"}, '```json\n{"a": 1}\n```', 'Here: {"a": 1}'),
    ({"rule": "title"}, "x\n<<A title>>", "<< >> <<a\nb>>"),
    ({"rule": "starts_with", "phrase": "Dear all"}, " dear ALL, x", "Oh dear all"),
    ({"rule": "ends_with", "phrase": "The end."}, 'x. the end."', "The end. x"),
    ({"rule": "postscript", "marker": "P.S."}, "x\n\np. s. y", "stop.s."),
    (
        {"rule": "paragraph_begins", "n": 2, "place": 2, "word": "so"},
        "a\n\n'So, b",
        "a\n\nSoon b",
    ),
    ({"rule": "paragraph_begins", "n": 2, "place": 1, "word": "a"}, "a\n\nb", "a\n\nb\n\nc"),
    ({"rule": "two_responses"}, "a\n******\nb", "a\n******\na"),
    ({"rule": "two_responses"}, "a******b******", "a****** ******b"),
    ({"rule": "one_of", "options": ["yes", "no"]}, "I say yes", "maybe"),
    ({"rule": "quoted"}, ' "a" ', '"a'),
    ({"rule": "quoted"}, "“啊”", '"'),
    ({"rule": "uppercase"}, "A B 1", "A b"),
    ({"rule": "lowercase"}, "a, b", "a B"),
    ({"rule": "no_commas"}, "a. b", "你好，世界"),
    ({"rule": "language", "language": "ru"}, "Привет, OK", "Hello"),
    ({"rule": "language", "language": "ja"}, "ひらがな漢字", "русский"),
]


@pytest.mark.parametrize(("name", "parameters", "response", "count"), COUNTS)
def test_counts(name, parameters, response, count):
    def kept(relation, n):
        return check([{"rule": f"{name}_{relation}", "n": n} | parameters], response) == [True]

    assert kept("at_least", count)
    assert not kept("at_least", count + 1)
    assert kept("at_most", count)
    assert count == 0 or not kept("at_most", count - 1)
    assert kept("exactly", count)
    assert not kept("exactly", count + 1)


@pytest.mark.parametrize(("rule", "good", "bad"), OTHERS)
def test_rules_are_kept_and_broken(rule, good, bad):
    assert check([rule], good) == [True]
    assert check([rule], bad) == [False]


def test_every_rule_is_tried_here():
    tried = {rule["rule"] for rule, _, _ in OTHERS} | {
        f"{name}_{relation}"
        for name, *_ in COUNTS
        for relation in ("at_least", "at_most", "exactly")
    }
    assert tried == set(RULES)


def test_a_response_of_white_space_keeps_to_nothing():
    assert check([{"rule": "no_commas"}, {"rule": "words_at_most", "n": 3}], " \n") == [
        False,
        False,
    ]
    assert check([], "x") == []


def test_loosely_the_first_and_last_lines_and_asterisks_may_be_left_out():
    quoted = [{"rule": "quoted"}, {"rule": "words_at_least", "n": 1}]
    for response in (
        'Sure:\n"a"',
        '"a"\nDone.',
        'Sure:\n"a"\nDone.',
        '**"a"**',
        'Sure:\n*"a"*\nDone.',
    ):
        assert check(quoted, response) == [False, True]
        assert check_loosely(quoted, response) == [True, True]
    assert check_loosely(quoted, 'Sure:\nyes:\n"a"') == [False, True]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"rule": "word_at_least", "n": 3},
            r"no rule 'word_at_least'; did you mean words_at_least",
        ),
        ({"rule": "words_at_least"}, "takes the parameters n, and was given none"),
        ({"rule": "json", "n": 1}, "takes the parameters none, and was given n"),
        ({"rule": "words_at_least", "n": "3"}, "a whole number"),
        ({"rule": "words_at_least", "n": True}, "a whole number"),
        ({"rule": "words_at_least", "n": -1}, "a whole number"),
        ({"rule": "keywords", "keywords": "cat"}, "a list of texts"),
        ({"rule": "keywords", "keywords": []}, "a list of texts"),
        ({"rule": "starts_with", "phrase": " "}, "a text that is not empty"),
        ({"rule": "language", "language": "xx"}, "'xx' is unknown"),
        ({"rule": "letter_at_least", "n": 1, "letter": "ab"}, r"letter: 'ab' is not one letter"),
        ({"n": 3}, "must be an object with a `rule`"),
    ],
)
def test_a_wrong_rule_is_told(rule, message):
    with pytest.raises(UserError, match=message):
        check([rule], "a")
    with pytest.raises(UserError, match=message):
        rules_of({"rules": [rule]})


def test_records_of_ifeval_are_read():
    names = [
        "length_constraints:number_words",
        "length_constraints:number_words",
        "detectable_format:multiple_sections",
        "combination:repeat_prompt",
        "detectable_format:constrained_response",
        "keywords:letter_frequency",
        "punctuation:no_comma",
    ]
    kwargs = [
        {"num_words": 30, "relation": "at least", "keywords": None},
        {"num_words": 50, "relation": "less than"},
        {"section_spliter": "Part", "num_sections": 2},
        {"prompt_to_repeat": "Say it."},
        {},
        {"letter": "a", "let_frequency": 3, "let_relation": "at least"},
        {},
    ]
    answers = ["My answer is yes.", "My answer is no.", "My answer is maybe."]
    assert rules_of({"instruction_id_list": names, "kwargs": kwargs}) == [
        {"rule": "words_at_least", "n": 30},
        {"rule": "words_at_most", "n": 49},
        {"rule": "sections_at_least", "n": 2, "heading": "Part"},
        {"rule": "starts_with", "phrase": "Say it."},
        {"rule": "one_of", "options": answers},
        {"rule": "letter_at_least", "n": 3, "letter": "a"},
        {"rule": "no_commas"},
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "rules: are missing"),
        ({"rules": []}, "one rule or more"),
        ({"rules": "json"}, "must be a list"),
        ({"rules": [3]}, "must be an object"),
        ({"instruction_id_list": ["x:y"], "kwargs": [{}]}, "'x:y' is none of IFEval's"),
        ({"instruction_id_list": ["startend:quotation"], "kwargs": []}, "for each instruction"),
        ({"instruction_id_list": ["startend:quotation"], "kwargs": [1]}, "must be an object"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{}]}, "needs keywords"),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 3, "relation": "about"}],
            },
            "says no number",
        ),
    ],
)
def test_a_wrong_record_is_told(record, message):
    with pytest.raises(UserError, match=message):
        rules_of(record)


def test_no_response_takes_long():
    rules = [{"rule": f"{name}_at_least", "n": 1} | others for name, others, _, _ in COUNTS]
    rules += [rule for rule, _, _ in OTHERS]
    for piece in ("*", "[", "<<", ".", " ", "\n", "-", '"', "a", "P.", "**a", "[a", "<<a", "\n \t"):
        begin = time.perf_counter()
        check(rules, piece * 20_000)
        check(rules, "<<" + piece * 20_000 + "x")
        assert time.perf_counter() - begin < 10, piece


def test_the_ready_prompts_have_rules_that_can_be_kept_together():
    records = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    assert len({record["prompt"] for record in records}) == len(records) >= 30
    used = {rule["rule"] for record in records for rule in rules_of(record)}
    assert len(used) >= 25
    assert 5 <= sum(not record["prompt"].isascii() for record in records) < len(records)
