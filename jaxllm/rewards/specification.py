"""Rewards as a configuration writes them: `numeric:1,length(limit=200):0.1,my_module:function`."""

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from jaxllm.errors import UserError
from jaxllm.rewards.arithmetic import Arithmetic
from jaxllm.rewards.own_function import load_function
from jaxllm.rewards.reward import OneByOne, RewardFunction
from jaxllm.rewards.style import Format, Length, Regex, Repetition
from jaxllm.rewards.verifiers import ExactMatch, Numeric
from jaxllm.rewards.weighted import Rewards, WeightedReward

REWARDS: Mapping[str, type[OneByOne]] = {
    "exact_match": ExactMatch,
    "numeric": Numeric,
    "arithmetic": Arithmetic,
    "regex": Regex,
    "format": Format,
    "length": Length,
    "repetition": Repetition,
}
"""Reward functions by name; their fields are their options."""

_ENTRY = re.compile(
    r"(?:(?P<label>[A-Za-z][\w.-]*)\s*=\s*)?"
    r"(?P<name>[A-Za-z_][\w.]*)(?::(?P<function>[A-Za-z_]\w*))?"
    r"(?:\((?P<options>.*)\))?"
    r"(?:\s*:\s*(?P<weight>[^\s:()]+))?",
    re.DOTALL | re.ASCII,
)
_OPTION = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)\s*=\s*)?(?P<value>.+)", re.DOTALL | re.ASCII)
_FORM = "[NAME=]REWARD[(OPTION=VALUE, …)][:WEIGHT]"
_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def parse_rewards(
    spec: str,
    field: str,
    models: Mapping[str, RewardFunction] | None = None,
    model_field: str = "reward.init",
) -> Rewards:
    """The rewards of a comma string, each `[NAME=]REWARD[(OPTION=VALUE, …)][:WEIGHT]`.

    REWARD is one of `REWARDS`, of `models`, or `MODULE:FUNCTION`, the user's own. A value that
    holds a comma, a parenthesis or a quote stands in quotes of the other kind, in which no sign
    is special. A first value without its option's name is that of the first option. The weight is
    1 where none is given. NAME is what the reward is called, instead of REWARD or FUNCTION.

    Args:
        spec: the comma string.
        field: the configuration field it comes from, for messages.
        models: reward models by name (see `weighted.from_scorer`).
        model_field: the configuration field that names the run of one, for messages.

    Raises:
        UserError: it has no entry or one not of this form, a reward, option or value is wrong, a
            function cannot be loaded, or two rewards have one name.
    """
    where = f"config.{field}"
    parts = [
        _weighted(entry, f"{where}: {entry}", models or {}, model_field)
        for entry in _split(spec, where)
        if entry
    ]
    if not parts:
        raise UserError(f"{where}: names no reward; there are {_known(models or {})}.")
    names = [part.name for part in parts]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"{where}: two rewards are called {repeated[0]}; write NAME= before one of them, as in "
            "first=regex(a),second=regex(b)."
        )
    return Rewards(tuple(parts))


def _split(text: str, where: str) -> Iterator[str]:
    """What stands between the commas that are in no parentheses or quotes, without white space.

    Raises:
        UserError: a parenthesis or a quote is not closed.
    """
    begin, depth, quote = 0, 0, ""
    for place, sign in enumerate(text):
        if quote or sign in "\"'":
            quote = (quote if sign != quote else "") if quote else sign
        elif sign in "()":
            depth += 1 if sign == "(" else -1
        elif sign == "," and not depth:
            yield text[begin:place].strip()
            begin = place + 1
    if quote or depth:
        what = f"a quote {quote}" if quote else "a parenthesis"
        raise UserError(f"{where}: {what} is not closed or not opened in {text[begin:].strip()!r}.")
    yield text[begin:].strip()


def _weighted(
    entry: str, where: str, models: Mapping[str, RewardFunction], model_field: str
) -> WeightedReward:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise UserError(f"{where}: is not {_FORM}.")
    name, function, weight = match["name"], match["function"], match["weight"]
    if function and weight is None and (name in REWARDS or name in models):
        function, weight = None, function  # `nan`, or a word
    label, options = match["label"] or function or name, match["options"]
    number = _weight(weight, where)
    if name in REWARDS and not function:
        return WeightedReward(label, _made(name, options or "", where), number)
    if options is not None:
        raise UserError(f"{where}: {function or name} takes no options; leave out ({options}).")
    if name in models and not function:
        return WeightedReward(label, models[name], number, is_model=True)
    if function:
        try:
            return WeightedReward(label, load_function(name, function), number)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if name == "reward_model":
        raise UserError(f"{where}: no reward model is given; name its run in config.{model_field}.")
    near = difflib.get_close_matches(name, [*REWARDS, *models], n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {_known(models)}."
    raise UserError(f"{where}: there is no reward {name}; {hint}")


def _known(models: Mapping[str, RewardFunction]) -> str:
    return f"{', '.join([*REWARDS, *models])}, and functions of your own as MODULE:FUNCTION"


def _weight(text: str | None, where: str) -> float:
    try:
        weight = 1.0 if text is None else float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"{where}: its weight must be a finite number; was {text!r}.")
    return weight


def _made(name: str, options: str, where: str) -> OneByOne:
    """A reward with its options.

    Raises:
        UserError: an option is unknown, missing, given twice, or of another type or range.
    """
    kinds = typing.get_type_hints(REWARDS[name])
    given: dict[str, Any] = {}
    for place, text in enumerate(_split(options, where) if options.strip() else ()):
        match = _OPTION.fullmatch(text)
        option = (match["name"] if match else None) or next(iter(kinds), "")
        if match is None or (match["name"] is None and (place or not option)):
            raise UserError(f"{where}: {text!r} is not OPTION=VALUE; {_options(name)}")
        if option not in kinds:
            raise UserError(f"{where}: {name} has no option {option}; {_options(name)}")
        if option in given:
            raise UserError(f"{where}: {option} is given twice; once is enough.")
        given[option] = _value(match["value"], kinds[option], f"{where}: {option}")
    fields = dataclasses.fields(REWARDS[name])
    for field in fields:
        if field.name not in given and field.default is dataclasses.MISSING:
            raise UserError(
                f"{where}: {name} needs its option {field.name}, as in {name}({field.name}=…)."
            )
    try:
        return REWARDS[name](**given)
    except ValueError as error:
        raise UserError(f"{where}: {error}.") from None


def _options(name: str) -> str:
    names = ", ".join(field.name for field in dataclasses.fields(REWARDS[name]))
    return f"its options are {names}." if names else "it takes none."


def _value(text: str, kind: type, where: str) -> Any:
    quoted = text[0] in "\"'"
    inner = text[1:-1] if quoted else text
    if quoted and (text[-1] != text[0] or len(text) < 2 or text[0] in inner):
        raise UserError(f"{where}: {text} is not one text in quotes; use those of the other kind.")
    if not quoted and re.search(r"[\"'()]", text):
        raise UserError(f"{where}: {text} holds quotes or parentheses; put all of it into quotes.")
    try:
        return {"true": True, "false": False}[inner.lower()] if kind is bool else kind(inner)
    except (ValueError, KeyError):
        raise UserError(f"{where}: must be {_KINDS[kind]}; was {inner!r}.") from None
