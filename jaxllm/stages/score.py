"""The `score` stage: a classifier tells what texts are, a reward model how good responses are."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.cleaning import Cleaner, CleaningConfig
from jaxllm.data.conversations import json_line
from jaxllm.data.labels import joined_text
from jaxllm.data.preferences import Asked, read_asked_and_answered
from jaxllm.data.rankings import ResponseIds, joint_of, response_ids
from jaxllm.data.records import BadLine
from jaxllm.data.sources import make_source
from jaxllm.errors import UserError
from jaxllm.files import write_atomically
from jaxllm.inference.classifier import Prediction, labels_config_of, load_classifier
from jaxllm.inference.reward_model import RewardModel, is_reward_model, load_reward_model
from jaxllm.sharding.mesh import MeshConfig, make_mesh

SCORES_FILE = "scores.jsonl"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """What a classifier makes of texts, or a reward model of responses."""

    stage: str = "score"
    """Always `score`."""
    init: str = ""
    """Run directory of the stage `classify` or `reward`."""
    text: str = ""
    """A text to classify."""
    texts: str = ""
    """Source of records, in the place of `text`: a file, a glob, `builtin:`, …. A classifier reads
    the fields that it was trained on, a reward model a prompt and `response`, or several. What is
    told of them goes to `scores.jsonl` in the work directory."""
    batch_size: int = 32
    """Texts or responses scored at once."""
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError("batch_size: must be at least 1")
        try:
            self.text.encode()
        except UnicodeEncodeError:  # bytes of a command line that are not UTF-8
            raise ValueError("text: is not Unicode text") from None


def run(config: ScoreConfig, workdir: Path | None) -> None:
    """Prints what `text` is; what is told of a file's goes to `scores.jsonl`."""
    if not config.init:
        raise UserError("config.init: give the run directory of the stage classify or reward.")
    if bool(config.text) == bool(config.texts):
        raise UserError("config.text: give a text, or config.texts with a source, and not both.")
    if config.texts and workdir is None:
        raise UserError("--workdir is missing: what config.texts are goes there.")
    if config.text and workdir is not None:
        raise UserError(f"--workdir={workdir}: what one text is, is printed; leave it out.")
    mesh = make_mesh(config.mesh)
    if is_reward_model(config.init):
        if config.text:
            raise UserError(
                "config.text: a reward model scores responses to prompts; give records of "
                "`prompt` and `response` as config.texts."
            )
        assert workdir is not None
        with jax.set_mesh(mesh):
            scorer = load_reward_model(config.init, mesh, config.batch_size)
            _write(workdir, _rewarded(scorer, config.texts), "records")
        return
    with jax.set_mesh(mesh):
        classify = load_classifier(config.init, mesh, config.batch_size)
        if not config.texts:
            print(json.dumps(_told(classify([config.text])[0]), ensure_ascii=False))
            return
        fields = labels_config_of(RunDirectory(config.init)).text_fields
        records = list(_records(config.texts, fields))
        if not records:
            raise UserError(f"config.texts: there are no records in {config.texts}.")
        found = classify([text for _, text in records])
    assert workdir is not None
    lines = [read | _told(prediction) for (read, _), prediction in zip(records, found, strict=True)]
    _write(workdir, lines, "texts")


def _write(workdir: Path, lines: Sequence[Mapping[str, Any]], what: str) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / SCORES_FILE
    write_atomically(path, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    print(f"{path}: {len(lines):,} {what}")


def _rewarded(scorer: RewardModel, source: str) -> list[dict[str, Any]]:
    """Each record with `reward`, that of its one response, or `rewards`, best response first."""
    clean = Cleaner(scorer.cleaning or CleaningConfig())

    def read(fields: Mapping[str, Any]) -> tuple[Asked, list[ResponseIds]]:
        json_line(fields)  # it is to be written again
        asked = read_asked_and_answered(fields, joint_of(scorer.template), clean, True)
        responses = list(asked.responses.values())
        return asked, response_ids(scorer.template, asked.messages, responses, asked.tools)

    records = list(_read(source, read))
    if not records:
        raise UserError(f"config.texts: there are no records in {source}.")
    rewards = iter(scorer.of_ids([ids for _, (_, laid_out) in records for ids in laid_out]))
    lines = []
    for fields, (asked, _) in records:
        found = [round(next(rewards), 6) for _ in asked.responses]
        single = set(asked.responses) <= {"response", "completion"}
        lines.append(fields | ({"reward": found[0]} if single else {"rewards": found}))
    return lines


def _records(source: str, fields: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """The fields of each record that are read, and its text.

    Raises:
        UserError: a record has none.
    """
    for read, text in _read(source, lambda found: joined_text(found, fields)):
        yield {name: read[name] for name in fields}, text


def _read(
    source: str, read: Callable[[Mapping[str, Any]], T]
) -> Iterator[tuple[dict[str, Any], T]]:
    """The fields of each record, and what is read of them.

    Raises:
        UserError: a line is no record, or `read` raises a ValueError.
    """
    for record in make_source(source, "config.texts", parse_special_tokens=False).records():
        if isinstance(record, BadLine):
            raise UserError(f"{record.file}, line {record.line}: {record.reason}.")
        try:
            yield dict(record.fields), read(record.fields)
        except ValueError as error:
            raise UserError(f"{record.file}, line {record.line}: {error}.") from None


def _told(prediction: Prediction) -> dict[str, Any]:
    shares = {name: round(value, 6) for name, value in prediction.probabilities.items()}
    return {"label": prediction.label} | ({"probabilities": shares} if shares else {})
