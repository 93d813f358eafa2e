"""The `score` stage: a trained classifier tells what one text is, or each of a file's."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.labels import joined_text
from jaxllm.data.records import BadLine
from jaxllm.data.sources import make_source
from jaxllm.errors import UserError
from jaxllm.files import write_atomically
from jaxllm.inference.classifier import Prediction, labels_config_of, load_classifier
from jaxllm.sharding.mesh import MeshConfig, make_mesh

SCORES_FILE = "scores.jsonl"


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """What a classifier makes of texts."""

    stage: str = "score"
    """Always `score`."""
    init: str = ""
    """Run directory of the stage `classify`."""
    text: str = ""
    """A text to classify."""
    texts: str = ""
    """Source of records to classify, in the place of `text`, with the fields that the run was
    trained on: a file, a glob, `builtin:`, …; what they are goes to `scores.jsonl` in the work
    directory."""
    batch_size: int = 32
    """Texts classified at once."""
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError("batch_size: must be at least 1")
        try:
            self.text.encode()
        except UnicodeEncodeError:  # bytes of a command line that are not UTF-8
            raise ValueError("text: is not Unicode text") from None


def run(config: ScoreConfig, workdir: Path | None) -> None:
    """Prints what `text` is; those of a file go to `scores.jsonl`."""
    if not config.init:
        raise UserError("config.init: give the run directory of the stage classify.")
    if bool(config.text) == bool(config.texts):
        raise UserError("config.text: give a text, or config.texts with a source, and not both.")
    if config.texts and workdir is None:
        raise UserError("--workdir is missing: what config.texts are goes there.")
    if config.text and workdir is not None:
        raise UserError(f"--workdir={workdir}: what one text is, is printed; leave it out.")
    mesh = make_mesh(config.mesh)
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
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / SCORES_FILE
    write_atomically(path, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    print(f"{path}: {len(lines):,} texts")


def _records(source: str, fields: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """The fields of each record that are read, and its text.

    Raises:
        UserError: a record has none.
    """
    for record in make_source(source, "config.texts", parse_special_tokens=False).records():
        if isinstance(record, BadLine):
            raise UserError(f"{record.file}, line {record.line}: {record.reason}.")
        try:
            text = joined_text(record.fields, fields)
        except ValueError as error:
            raise UserError(f"{record.file}, line {record.line}: {error}.") from None
        yield {name: record.fields[name] for name in fields}, text


def _told(prediction: Prediction) -> dict[str, Any]:
    shares = {name: round(value, 6) for name, value in prediction.probabilities.items()}
    return {"label": prediction.label} | ({"probabilities": shares} if shares else {})
