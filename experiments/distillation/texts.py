"""The texts of the study: what is trained on, what is held out, and what a teacher has written."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

from jaxllm.data.config import DataConfig
from jaxllm.data.selection import split_documents
from jaxllm.data.split import HELD_OUT, TRAIN

BEGINNINGS = "beginnings.jsonl"
TRAINED_ON, HELD = "train.jsonl", "held_out.jsonl"
WRITTEN = "written.jsonl"


_LETTERS = 240
"""Of what a teacher goes on from: some 64 tokens."""


def split(sources: str, folder: Path, beginnings: int) -> None:
    """Writes the documents of sources into files, those held out apart, so that every run reads
    the same; and so many pieces of what is trained on, for a teacher to go on from."""
    if (folder / BEGINNINGS).exists():
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
    draw, texts = random.Random(0), sides[TRAIN]
    with (folder / BEGINNINGS).open("w", encoding="utf-8") as file:
        # As likely as a letter of a text is to be read.
        for text in draw.choices(texts, [len(text) for text in texts], k=beginnings):
            begin = draw.randrange(max(1, len(text) - _LETTERS))
            prompt = text[begin : begin + _LETTERS]
            file.write(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n")


def keep_written(generations: Path, path: Path) -> None:
    """Writes what a teacher wrote, behind what it went on from, as documents."""
    if generations.exists() and not path.exists():
        with generations.open(encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        _write(path, (record["prompt"] + record["response"] for record in records))


def _write(path: Path, texts: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
