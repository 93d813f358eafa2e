"""The `score` stage: a classifier tells what texts are, rewards how good responses are."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.cleaning import Cleaner, CleaningConfig
from jaxllm.data.conversations import json_line
from jaxllm.data.labels import joined_text
from jaxllm.data.preferences import read_asked, read_asked_and_answered, read_responses
from jaxllm.data.rankings import ResponseIds, joint_of, response_ids
from jaxllm.data.records import BadLine
from jaxllm.data.sources import make_source
from jaxllm.errors import UserError
from jaxllm.files import write_atomically
from jaxllm.inference.classifier import Prediction, labels_config_of, load_classifier
from jaxllm.inference.reward_model import RewardModel, is_reward_model, load_reward_model
from jaxllm.rewards.specification import parse_rewards
from jaxllm.sharding.mesh import MeshConfig, make_mesh

SCORES_FILE = "scores.jsonl"
_MODEL = "reward_model"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """What a classifier makes of texts, or rewards of responses."""

    stage: str = "score"
    """Always `score`."""
    init: str = ""
    """Run directory of the stage `classify` or `reward`."""
    rewards: str = ""
    """What responses are worth, as `numeric:1,format:0.2`: docs/rewards.md. `reward_model` is that
    of `init`; empty: it alone."""
    least: str = ""
    """A number: records none of whose responses is worth so much are left out of `scores.jsonl`;
    with `rewards=numeric` and 1, traces whose answer is wrong. Empty: none is left out."""
    text: str = ""
    """A text to classify."""
    texts: str = ""
    """Source of records, in the place of `text`: a file, a glob, `builtin:`, …. A classifier reads
    the fields that it was trained on, rewards a prompt and `response`, or several. What is told of
    them goes to `scores.jsonl` in the work directory."""
    batch_size: int = 32
    """Texts or responses scored at once."""
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError("batch_size: must be at least 1")
        try:
            float(self.least or 0)
        except ValueError:
            raise ValueError(f"least: must be a number; was {self.least!r}") from None
        try:
            self.text.encode()
        except UnicodeEncodeError:  # bytes of a command line that are not UTF-8
            raise ValueError("text: is not Unicode text") from None


def run(config: ScoreConfig, workdir: Path | None) -> None:
    """Prints what `text` is; what is told of a file's goes to `scores.jsonl`."""
    if not (config.init or config.rewards):
        raise UserError(
            "config.init: give the run directory of the stage classify or reward, or "
            "config.rewards with functions that say what responses are worth."
        )
    if bool(config.text) == bool(config.texts):
        raise UserError("config.text: give a text, or config.texts with a source, and not both.")
    if config.texts and workdir is None:
        raise UserError("--workdir is missing: what config.texts are goes there.")
    if config.text and workdir is not None:
        raise UserError(f"--workdir={workdir}: what one text is, is printed; leave it out.")
    if config.rewards or is_reward_model(config.init):
        if config.text:
            raise UserError(
                "config.text: rewards are of responses to prompts; give records of `prompt` and "
                "`response` as config.texts."
            )
        assert workdir is not None
        least = float(config.least or "-inf")
        lines = [line for line, most in _rewarded(config) if most >= least]
        _write(workdir, lines, "records")
        return
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        classify = load_classifier(config.init, mesh, config.batch_size)
        if not config.texts:
            print(json.dumps(_told(classify([config.text])[0]), ensure_ascii=False))
            return
        fields = labels_config_of(RunDirectory(config.init)).text_fields
        read = functools.partial(_text_and_fields, names=fields)
        records = [found for _, found in _read(config.texts, read)]
        if not records:
            raise UserError(f"config.texts: there are no records in {config.texts}.")
        predictions = classify([text for text, _ in records])
    assert workdir is not None
    lines = [
        kept | _told(prediction) for (_, kept), prediction in zip(records, predictions, strict=True)
    ]
    _write(workdir, lines, "texts")


def _write(workdir: Path, lines: Sequence[Mapping[str, Any]], what: str) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / SCORES_FILE
    write_atomically(path, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    print(f"{path}: {len(lines):,} {what}")


class _Judged(NamedTuple):
    """What is judged of a record."""

    fields: dict[str, Any]
    """All of it."""
    prompt: str
    """The last message."""
    responses: dict[str, str]
    """By their names in the record, best first."""
    laid_out: list[ResponseIds]
    """The same for a reward model, if there is one."""

    @property
    def is_single(self) -> bool:
        """Whether the record holds a response rather than several."""
        return set(self.responses) <= {"response", "completion"}


def _rewarded(config: ScoreConfig) -> list[tuple[dict[str, Any], float]]:
    """Each record with `reward`, that of its one response, or `rewards`, best response first; and
    with `values`, what each of `config.rewards` gives, if these are asked for. Beside it stands
    the highest reward of the record."""
    of_model: list[float] = []
    # They are asked once, for all responses in order.
    models = {_MODEL: lambda prompts, responses, records: of_model} if config.init else {}
    rewards = parse_rewards(config.rewards or _MODEL, "rewards", models, "init")
    if config.init and not any(part.is_model for part in rewards.parts):
        raise UserError(
            f"config.init: config.rewards has no {_MODEL} that reads it; leave one of both out."
        )
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        scorer = load_reward_model(config.init, mesh, config.batch_size) if config.init else None
        read = list(_read(config.texts, functools.partial(_judged, scorer)))
        if not read:
            raise UserError(f"config.texts: there are no records in {config.texts}.")
        if scorer:
            of_model += scorer.of_ids([ids for _, judged in read for ids in judged.laid_out])
    every = [
        (f"{place}, {name}", judged, text)
        for place, judged in read
        for name, text in judged.responses.items()
    ]
    scores = rewards(
        [judged.prompt for _, judged, _ in every],
        [text for _, _, text in every],
        [judged.fields for _, judged, _ in every],
        [place for place, _, _ in every],
    )
    lines, begin = [], 0
    for _, judged in read:
        span = slice(begin, begin + len(judged.responses))
        told = functools.partial(_rounded, single=judged.is_single)
        name = "reward" if judged.is_single else "rewards"
        line = judged.fields | {name: told(scores.total[span])}
        if config.rewards:
            line["values"] = {name: told(values[span]) for name, values in scores.by_name.items()}
        lines.append((line, float(np.max(scores.total[span]))))
        begin = span.stop
    return lines


def _rounded(values: np.ndarray, single: bool) -> float | list[float]:
    found = [round(float(value), 6) for value in values]
    return found[0] if single else found


def _judged(scorer: RewardModel | None, fields: Mapping[str, Any]) -> _Judged:
    """What is judged of a record.

    Raises:
        ValueError: it has no prompt, or no response.
    """
    json_line(fields)  # it is to be written again
    messages = read_asked(fields, "\n")
    laid_out: list[ResponseIds] = []
    if scorer:
        clean = Cleaner(scorer.cleaning or CleaningConfig())
        asked = read_asked_and_answered(fields, joint_of(scorer.template), clean, True)
        texts = list(asked.responses.values())
        laid_out = response_ids(scorer.template, asked.messages, texts, asked.tools)
    responses = read_responses(fields, True)
    return _Judged(dict(fields), messages[-1]["content"], responses, laid_out)


def _text_and_fields(fields: Mapping[str, Any], names: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The text that a classifier reads of a record, and the fields that it is of.

    Raises:
        ValueError: it has none.
    """
    return joined_text(fields, names), {name: fields[name] for name in names}


def _read(source: str, read: Callable[[Mapping[str, Any]], T]) -> Iterator[tuple[str, T]]:
    """Where each record stands, and what is read of it.

    Raises:
        UserError: a line is no record, or `read` raises a ValueError.
    """
    for record in make_source(source, "config.texts", parse_special_tokens=False).records():
        place = f"{record.file}, line {record.line}"
        if isinstance(record, BadLine):
            raise UserError(f"{place}: {record.reason}.")
        try:
            yield place, read(record.fields)
        except ValueError as error:
            raise UserError(f"{place}: {error}.") from None


def _told(prediction: Prediction) -> dict[str, Any]:
    shares = {name: round(value, 6) for name, value in prediction.probabilities.items()}
    return {"label": prediction.label} | ({"probabilities": shares} if shares else {})
