"""Several rewards with weights as one, whose results are checked: whatever is wrong with one is
told by its name and the record."""

import dataclasses
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from jaxllm.errors import UserError, unanswered
from jaxllm.rewards.reward import Record, RewardFunction

Values = Float64[np.ndarray, " responses"]

_SHOWN = 60  # characters of a prompt, or of a wrong value, in messages
_TOLD = 200  # characters of what a function raises


@dataclasses.dataclass(frozen=True)
class WeightedReward:
    """One reward of several."""

    name: str
    """Its part of the names of metrics."""
    function: RewardFunction
    weight: float = 1.0
    """What its values are multiplied by; 0: they are measured only."""
    is_model: bool = False
    """Whether it is a model rather than a program: what it raises may be the device's or another
    process's doing, and goes on as it is; nor is it called again."""

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        records: Sequence[Record],
        places: Sequence[str] = (),
    ) -> Values:
        """The values of the function, without the weight.

        Args:
            prompts, responses, records: of each response.
            places: what each is called in messages; none: `record 0`, `record 1`, ….

        Raises:
            UserError: the function raises, or does not give one finite number for each response;
                the message names the reward, and the record where it is one's.
        """
        try:
            values = self.function(list(prompts), list(responses), list(records))
        except Exception as error:
            if self.is_model or unanswered(error):
                raise
            raise self._culprit(prompts, responses, records, places, error) from error
        return self._checked(values, prompts, places)

    def _culprit(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        records: Sequence[Record],
        places: Sequence[str],
        error: Exception,
    ) -> UserError:
        """What the function raises, told with the first record that it raises for alone."""
        for index, prompt in enumerate(prompts):
            try:
                self.function([prompt], [responses[index]], [records[index]])
            except Exception as alone:
                if unanswered(alone):
                    raise
                return UserError(f"{self._where(index, prompts, places)}: {self._told(alone)}")
        return UserError(
            f"the reward {self.name}, for {len(prompts)} records at once and for none of them "
            f"alone: {self._told(error)}"
        )

    def _told(self, error: Exception) -> str:
        if isinstance(error, UserError):  # which says what to do
            return str(error)
        text = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
        return f"it raises {_short(text, _TOLD)}{_line(error, self.function)}; mend it."

    def _checked(self, values: Any, prompts: Sequence[str], places: Sequence[str]) -> Values:
        listed = hasattr(values, "__len__") and not isinstance(values, str | bytes | Mapping)
        try:
            found = list(values) if listed else None
        except Exception:  # whatever it is
            found = None
        if found is None:
            raise UserError(
                f"the reward {self.name}: it returns {_short(repr(values))}, of the type "
                f"{type(values).__name__}; return a list of numbers, one for each response."
            )
        if len(found) != len(prompts):
            raise UserError(
                f"the reward {self.name}: it returns {len(found)} numbers for {len(prompts)} "
                "responses; return one for each, in their order."
            )
        checked = np.zeros(len(prompts))
        for index in range(len(prompts)):
            number = _number(found[index])
            if not math.isfinite(number):
                where = self._where(index, prompts, places)
                raise UserError(
                    f"{where}: it gives {_short(repr(found[index]))}, which is no finite number; "
                    "return one."
                )
            checked[index] = number
        return checked

    def _where(self, index: int, prompts: Sequence[str], places: Sequence[str]) -> str:
        prompt = _short(" ".join(prompts[index].split()))
        place = places[index] if places else f"record {index}"
        return f"the reward {self.name}, {place} (prompt {prompt!r})"


@dataclasses.dataclass(frozen=True)
class Scores:
    """What responses are worth."""

    total: Values
    """Σ weight · value over the rewards."""
    by_name: Mapping[str, Values]
    """The values of each reward, without its weight."""


@dataclasses.dataclass(frozen=True)
class Rewards:
    """Rewards with weights; their names differ."""

    parts: tuple[WeightedReward, ...]

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if not names:
            raise ValueError("there is no reward")
        if len(set(names)) < len(names):
            raise ValueError(f"two rewards have one name: {', '.join(names)}")

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        records: Sequence[Record],
        places: Sequence[str] = (),
    ) -> Scores:
        """Scores responses; prompts and records are those of each response, in the same order, and
        `places` what they are called in messages (see `WeightedReward`).

        Raises:
            ValueError: there are not as many of each.
            UserError: a reward fails, or is none, see `WeightedReward`.
        """
        if not len(prompts) == len(responses) == len(records):
            raise ValueError(
                f"{len(prompts)} prompts, {len(responses)} responses, {len(records)} records"
            )
        by_name = {part.name: part(prompts, responses, records, places) for part in self.parts}
        total = np.zeros(len(responses))
        for part in self.parts:
            total += part.weight * by_name[part.name]
        return Scores(total, by_name)


def from_scorer(
    scorer: Callable[[Sequence[str], Sequence[str]], Sequence[float] | np.ndarray],
) -> RewardFunction:
    """A reward model as a reward function, which needs no record.

    Args:
        scorer: takes prompts and responses, gives a number for each pair.
    """
    return lambda prompts, responses, _: scorer(prompts, responses)


def _number(value: Any) -> float:
    """A number of any library as a float; NaN if it is none."""
    if getattr(value, "ndim", 0) or not hasattr(value, "__float__"):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):  # such as an int beyond float's range
        return math.nan


def _line(error: Exception, function: RewardFunction) -> str:
    """` (FILE:LINE)` of the function's own file where an error comes from, if it can be told."""
    own = getattr(getattr(function, "__code__", None), "co_filename", None)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == own]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _short(text: str, most: int = _SHOWN) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
