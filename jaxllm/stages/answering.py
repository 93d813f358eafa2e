"""Questions to a teacher, and its answers to judge and files: the work of `generate_data`."""

import collections
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.documents import RejectedLines
from jaxllm.data.numbered import NumberedLines, OrderedLines
from jaxllm.data.questions import Questions
from jaxllm.data.records import BadLine
from jaxllm.errors import UserError
from jaxllm.inference.teacher import Answer, Failed, Question, Teacher, sample_seed
from jaxllm.reporting.progress import ProgressLine
from jaxllm.rollouts.answered import COUNTS, Selection, record_of
from jaxllm.rollouts.judging import Judge
from jaxllm.rollouts.responses import Response

_JUDGED_AT_ONCE = 64  # questions
_HOPELESS = 20
"""Questions in a row without an answer, after which none is expected any more, if more than are
allowed have none."""


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are asked, and what of the answers is kept."""

    system: str
    """System message for the teacher alone; empty: none."""
    seed: int
    samples: int
    told: Mapping[str, Any]
    """What each record tells of how its answer was made."""
    selection: Selection
    judge: Judge | None
    values_told: bool
    """Whether each reward's own value is told too."""
    max_failed_fraction: float


class Answering:
    """A run's answers, those of earlier lives among them."""

    def __init__(
        self,
        asking: Asking,
        questions: Questions,
        directory: RunDirectory,
        answers: NumberedLines,
        rewards: NumberedLines | None,
        rejected: RejectedLines,
        begin: Callable[[], None],
    ) -> None:
        """Args:
        asking: how.
        questions: what is asked.
        directory: of the run.
        answers: by the numbers of questions.
        rewards: of those that are judged, if they are.
        rejected: where questions are set aside.
        begin: called when the first answer has come.
        """
        self._asking, self._questions, self._directory = asking, questions, directory
        self._answers, self._rewards, self._rejected = answers, rewards, rejected
        self._begin = begin
        self._counts: dict[int, collections.Counter[str]] = {}
        self._totals = collections.Counter[str]()
        self._failed: list[BadLine] = []
        self._failed_in_a_row = 0

    @property
    def _total(self) -> int:
        return len(self._questions.prompts)

    @property
    def _most_failed(self) -> float:
        return self._asking.max_failed_fraction * self._total

    def run(self, teacher: Teacher) -> dict[str, float]:
        """Has asked what was not answered yet; the counts of all lives.

        Raises:
            UserError: the teacher refuses, a reward fails, or too many questions have no answer.
        """
        if len(self._answers):
            left = self._total - len(self._answers)
            print(
                f"{self._directory.path}: going on; {left:,} of {self._total:,} prompts are left",
                file=sys.stderr,
            )
        if self._rewards is not None:
            unjudged = (number for number in self._answers if number not in self._rewards)
            while some := list(itertools.islice(unjudged, _JUDGED_AT_ONCE)):
                self._judge(some)
        known = self._answers if self._rewards is None else self._rewards
        lines = OrderedLines(self._directory.answered, known, self._lines)
        with closing(lines), ProgressLine("prompt") as progress:
            self._show(progress)
            for outcomes in teacher.answer(list(self._asked())):
                answered = [(q.number, a) for q, a in outcomes if not isinstance(a, Failed)]
                failed = [(q.number, a) for q, a in outcomes if isinstance(a, Failed)]
                self._keep(answered)
                lines.add([n for n, _ in answered], [n for n, _ in failed])
                self._set_aside(failed, bool(answered))
                self._show(progress)
        if len(self._failed) > self._most_failed:
            raise self._too_many()
        return self._scores()

    def _asked(self) -> Iterator[Question]:
        for number, placed in enumerate(self._questions.prompts):
            messages = placed.prompt.messages
            if self._asking.system and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": self._asking.system}, *messages]
            yield Question(number, messages, placed.tools)

    def _keep(self, answered: Sequence[tuple[int, Sequence[Answer]]]) -> None:
        """Writes answers down before anything else is done with them."""
        if answered and not len(self._answers):
            self._begin()
        for number, answers in answered:
            self._answers.append(number, {"answers": [answer._asdict() for answer in answers]})
        self._judge([number for number, _ in answered])

    def _judge(self, numbers: Sequence[int]) -> None:
        """Writes down what the answers to questions are worth, if they are judged."""
        if self._asking.judge is None or self._rewards is None or not numbers:
            return
        asked, written = [], []
        for number in numbers:
            for answer in self._read(number):
                asked.append(self._questions.prompts[number].prompt)
                ended = answer.finish != "length"
                written.append(Response((), (), (), answer.text, ended))
        judged = self._asking.judge(asked, written)
        begin = 0
        for number in numbers:
            span = slice(begin, begin + len(self._read(number)))
            values = {name: list(map(float, v[span])) for name, v in judged.by_name.items()}
            rewards = list(map(float, judged.scores[span]))
            self._rewards.append(number, {"rewards": rewards, "values": values})
            begin = span.stop

    def _read(self, number: int) -> list[Answer]:
        return [Answer(**answer) for answer in self._answers[number]["answers"]]

    def _lines(self, number: int) -> Iterable[str]:
        """The lines of a question's answers that are kept; counts the others."""
        answers, prompt = self._read(number), self._questions.prompts[number].prompt
        judged = None if self._rewards is None else self._rewards[number]
        rewards = None if judged is None else judged["rewards"]
        kept, counts = self._asking.selection(answers, rewards)
        self._totals.subtract(self._counts.get(number, {}))  # lines may be written anew
        self._totals.update(counts)
        self._counts[number] = counts
        for place in kept:
            answer, samples = answers[place], self._asking.samples
            told = {
                **self._asking.told,
                "sample": place,
                "seed": sample_seed(self._asking.seed, number, place, samples),
                "finish": answer.finish,
                "tokens": answer.tokens,
            }
            if judged is not None:
                told["reward"] = round(judged["rewards"][place], 6)
            if judged is not None and self._asking.values_told:
                told["values"] = {k: round(v[place], 6) for k, v in judged["values"].items()}
            record = record_of(prompt.record, prompt.messages, answer, told)
            yield json.dumps(record, ensure_ascii=False)

    def _set_aside(self, failed: Sequence[tuple[int, Failed]], any_answered: bool) -> None:
        """Tells of questions without an answer, which the next life of the run asks again.

        Raises:
            UserError: there is no hope for the others.
        """
        for number, failure in failed:
            placed = self._questions.prompts[number]
            self._failed.append(BadLine(placed.file, placed.line, failure.reason))
            self._rejected.add(self._failed[-1])
        self._failed_in_a_row = 0 if any_answered else self._failed_in_a_row + len(failed)
        if self._failed_in_a_row >= _HOPELESS and len(self._failed) > self._most_failed:
            raise self._too_many()

    def _too_many(self) -> UserError:
        first = self._failed[0]
        return UserError(
            f"{len(self._failed):,} of {self._total:,} prompts got no answer, more than "
            f"config.max_failed_fraction={self._asking.max_failed_fraction:g} allows; the first is "
            f"{first.file}:{first.line} ({first.reason}); see {self._rejected.path}; the same "
            "command asks them again."
        )

    def _show(self, progress: ProgressLine) -> None:
        done = len(self._answers) + len(self._failed)
        progress.update(
            done, self._total, {"kept": self._totals["kept"], "failed": len(self._failed)}
        )

    def _scores(self) -> dict[str, float]:
        return {
            "data/prompts": float(self._total),
            "data/duplicate_prompts": float(self._questions.duplicates),
            "data/bad_lines": float(self._questions.bad_lines),
            "data/failed": float(len(self._failed)),
            **{f"answers/{name}": float(self._totals[name]) for name in COUNTS},
        }
