"""Several tasks measured at several numbers of examples, for one model or two."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence

from jaxllm.data.documents import RejectedLines
from jaxllm.errors import UserError
from jaxllm.evaluation.contamination import (
    ContaminationConfig,
    TaskContamination,
    find_contamination,
    training_texts,
)
from jaxllm.evaluation.fewshot import choose_examples, parse_shots, with_examples
from jaxllm.evaluation.items import Item, Layout
from jaxllm.evaluation.measures import MEASURES, Outcome, summary
from jaxllm.evaluation.statistics import mean, paired_difference, standard_error
from jaxllm.evaluation.tasks import Task, read_tasks, spread
from jaxllm.evaluation.text_model import TextModel

_NEW_TOKENS = {"answer": 32, "instructions": 512}
_NEW_TOKENS_OF_REASONING = 256


@dataclasses.dataclass(frozen=True)
class TasksConfig:
    """Tasks, and how they are put to the model."""

    tasks: str = ""
    """Tasks to measure, `SOURCE` or `NAME=SOURCE` separated by commas: docs/evaluating.md. The
    kind of each is told by the fields of its records. A pattern is a task for each file."""
    fewshot: str = "0"
    """Examples before each question, as `5`; or several numbers, `0,1,2,4,8`, for a curve."""
    fewshot_source: str = ""
    """Where examples come from, `SOURCE` for all tasks or `TASK=SOURCE`; empty: the other records
    of the task."""
    max_items: int = 0
    """Records of each task that are measured, spread evenly over all; 0: all."""
    chain_of_thought: bool = False
    """Ask for the reasoning before the answer, and show it in examples."""
    letters: bool = True
    """List the choices of a `question` and score their letters; False: score their texts."""
    max_new_tokens: int = 0
    """Tokens of a written answer at most; 0: 32, with `chain_of_thought` 256, for instructions
    512."""
    seed: int = 0
    """Of the choice of examples."""

    def __post_init__(self) -> None:
        for name in ("max_items", "max_new_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative")
        if not self.shots():
            raise ValueError("fewshot: names no number; 0 is none")

    def shots(self) -> tuple[int, ...]:
        """The numbers of examples, ascending.

        Raises:
            ValueError: one is no whole number from 0.
        """
        return parse_shots(self.fewshot, "fewshot")


@dataclasses.dataclass(frozen=True)
class PreparedTask:
    """A task with the examples of each of its items."""

    task: Task
    examples: tuple[tuple[Item, ...], ...]
    """As many for each item as are asked for at most."""
    max_new_tokens: int

    def prompts(self, shots: int) -> list[str]:
        """The prompt of each item behind so many examples."""
        pairs = zip(self.task.items, self.examples, strict=True)
        return [with_examples(item, examples[:shots]) for item, examples in pairs]


Results = dict[tuple[str, int], list[Outcome]]
"""The outcome of each item, by task and number of examples."""


def prepare(
    config: TasksConfig, most_shots: int, max_bad_fraction: float, rejected: RejectedLines
) -> list[PreparedTask]:
    """Reads the tasks of `config.tasks`, and draws `most_shots` examples for each item.

    Raises:
        UserError: a source or record is wrong, or there are too few records for the examples.
    """
    layout = Layout(config.chain_of_thought, config.letters)
    tasks = read_tasks(config.tasks, "tasks", layout, max_bad_fraction, rejected)
    pools = read_tasks(config.fewshot_source, "fewshot_source", layout, max_bad_fraction, rejected)
    names = [task.name for task in tasks]
    for other in pools:
        if other.named and other.name not in names:
            raise UserError(
                f"config.fewshot_source: {other.name}={other.source}: no task is called "
                f"{other.name}; there are {', '.join(names)}."
            )
    prepared = []
    for task in tasks:
        if most_shots and task.kind.measure == "instructions":
            raise UserError(
                f"config.fewshot: {task.name} is of instructions, whose records have no answer to "
                "show as an example; measure it with 0."
            )
        items = spread(task.items, config.max_items)
        pool = _pool(task, pools, names)
        examples = choose_examples(items, pool, most_shots, config.seed, task.name)
        measured = dataclasses.replace(task, items=items)
        prepared.append(PreparedTask(measured, tuple(examples), _new_tokens(task, config)))
    return prepared


def measure(prepared: Sequence[PreparedTask], model: TextModel, shots: Sequence[int]) -> Results:
    """What `model` makes of every item, behind each number of examples."""
    return {
        (each.task.name, number): MEASURES[each.task.kind.measure](
            model, each.task.items, each.prompts(number), each.max_new_tokens
        )
        for each in prepared
        for number in shots
    }


def look_for(
    prepared: Sequence[PreparedTask], config: ContaminationConfig, max_bad_fraction: float
) -> dict[str, TaskContamination]:
    """Which items stand in the training text that `config` names, by task; empty if it names none.

    Looked for is the question, as it stands in the record, or the text that is to be continued.

    Raises:
        UserError: as `contamination.training_texts`.
    """
    if not config.train.strip(", "):
        return {}
    texts = {each.task.name: [item.content for item in each.task.items] for each in prepared}
    training = training_texts(config, max_bad_fraction)
    return find_contamination(texts, training, config.ngram, config.min_words)


def scores(
    results: Results,
    baseline: Results | None = None,
    contamination: Mapping[str, TaskContamination] | None = None,
) -> dict[str, float]:
    """`evaluate/TASK/…` of `measures.summary`, or `evaluate/TASK/K_shot/…` of several shots.

    With a baseline, measured on the same items, also its score as `baseline_score`, and the mean
    paired `difference` to it. It was measured with the same numbers of examples, or with one
    number. Where training text was looked through, `unchecked` is the share of items too short to
    be looked for, `contaminated` the share of the others that was found, and `clean_score` the
    score of those that were not found (not a number if there are none).
    """
    several = len({shots for _, shots in results}) > 1
    found: dict[str, float] = {}
    for (task, shots), outcomes in results.items():
        values = summary(outcomes)
        if baseline is not None:
            others = baseline.get((task, shots)) or _only_of(task, baseline)
            theirs = summary(others)
            values["baseline_score"] = theirs["score"]
            values["baseline_score_stderr"] = theirs["stderr"]
            values["difference"], values["difference_stderr"] = paired_difference(
                [_first(outcome) for outcome in outcomes], [_first(outcome) for outcome in others]
            )
        if contamination:
            looked = contamination[task]
            clean = [_first(outcomes[place]) for place in looked.clean]
            values["contaminated"] = looked.contaminated
            values["unchecked"] = looked.unchecked
            values["clean_score"] = mean(clean) if clean else math.nan
            values["clean_score_stderr"] = standard_error(clean)
        place = f"evaluate/{task}/{shots}_shot" if several else f"evaluate/{task}"
        found |= {f"{place}/{name}": value for name, value in values.items()}
    return found


def item_lines(
    prepared: Sequence[PreparedTask],
    results: Results,
    model: str,
    contamination: Mapping[str, TaskContamination] | None = None,
) -> Iterator[str]:
    """A line of JSON for each item and number of examples: what was asked, answered and right."""
    for each in prepared:
        looked = (contamination or {}).get(each.task.name)
        overlaps = {overlap.item: overlap for overlap in looked.found} if looked else {}
        for (name, shots), outcomes in results.items():
            if name != each.task.name:
                continue
            asked = zip(each.task.items, each.prompts(shots), each.examples, outcomes, strict=True)
            for place, (item, prompt, examples, outcome) in enumerate(asked):
                line = {
                    "model": model,
                    "task": name,
                    "line": item.line,
                    "shots": shots,
                    "examples": [example.line for example in examples[:shots]],
                    "prompt": prompt,
                    **outcome.details,
                    **outcome.scores,
                    "left_out": outcome.left_out,
                }
                if place in overlaps:
                    line["in_training_text"] = overlaps[place].first
                yield json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


def _first(outcome: Outcome) -> float:
    return next(iter(outcome.scores.values()))


def _only_of(task: str, results: Results) -> list[Outcome]:
    return next(outcomes for (name, _), outcomes in results.items() if name == task)


def _pool(task: Task, pools: Sequence[Task], names: Sequence[str]) -> Sequence[Item]:
    """Where a task's examples come from: the source of its name, that of no task's, or itself."""
    named = [pool for pool in pools if pool.name == task.name]
    chosen = named or [pool for pool in pools if pool.name not in names]
    for pool in chosen:
        if pool.kind.measure != task.kind.measure:
            raise UserError(
                f"config.fewshot_source: the records of {pool.source} are not of the kind of "
                f"{task.name}; name the source of each task, as {task.name}=SOURCE."
            )
    return [item for pool in chosen for item in pool.items] or task.items


def _new_tokens(task: Task, config: TasksConfig) -> int:
    if config.max_new_tokens:
        return config.max_new_tokens
    if config.chain_of_thought and task.kind.measure == "answer":
        return _NEW_TOKENS_OF_REASONING
    return _NEW_TOKENS.get(task.kind.measure, 0)
