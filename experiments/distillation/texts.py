"""The texts of the study: what is trained on, what is held out, and what a teacher has written."""

import json
from collections.abc import Iterable
from pathlib import Path

from jaxllm.data.config import DataConfig
from jaxllm.data.selection import split_documents
from jaxllm.data.split import HELD_OUT, TRAIN

NOTHING = "nothing.jsonl"
TRAINED_ON, HELD = "train.jsonl", "held_out.jsonl"
WRITTEN = "written.jsonl"


def split(sources: str, folder: Path) -> None:
    """Writes the documents of sources into files, those held out apart, so that every run reads
    the same; and the prompt that has a teacher write from the beginning."""
    if (folder / NOTHING).exists():
        return
    sides: dict[int, list[str]] = {TRAIN: [], HELD_OUT: []}
    found = split_documents(
        DataConfig(train=sources), folder / "store", folder / "rejected", lambda *_: None
    )
    for document, side in found.documents():
        if side in sides:
            sides[side].append(document.text)
    _write(folder / TRAINED_ON, sides[TRAIN])
    _write(folder / HELD, sides[HELD_OUT])
    (folder / NOTHING).write_text(json.dumps({"prompt": ""}) + "\n")


def keep_written(generations: Path, path: Path) -> None:
    """Writes what a teacher wrote as documents."""
    if generations.exists() and not path.exists():
        with generations.open(encoding="utf-8") as lines:
            responses = [json.loads(line)["response"] for line in lines]
        _write(path, filter(str.strip, responses))


def _write(path: Path, texts: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
