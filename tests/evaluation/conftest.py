"""Models that know, or do not know, what is asked of them."""

import dataclasses
import json
import random
from collections.abc import Callable

import pytest

from jaxllm.data.documents import RejectedLines
from jaxllm.evaluation.suite import TasksConfig, prepare
from jaxllm.evaluation.text_model import TextModel, Written
from jaxllm.inference.scoring import LogLikelihood


@dataclasses.dataclass
class FakeModel(TextModel):
    """Likelihoods and texts by functions of what is asked; it remembers what was."""

    likelihood: Callable[[str, str], float] = lambda context, continuation: 0.0
    text: Callable[[str], str] = lambda prompt: ""

    def __post_init__(self):
        self.scored, self.asked = [], []

    def log_likelihoods(self, texts):
        self.scored += texts
        values = [self.likelihood(*text) for text in texts]
        return [LogLikelihood(value, (value,), value == 0, 0) for value in values]

    def write(self, prompts):
        """Texts end before a stop string, as those of a trained model do."""
        self.asked += prompts
        return [Written(_cut(self.text(prompt), how.stop), 0) for prompt, how in prompts]


def _cut(text, stop):
    return text[: min([text.index(s) for s in stop if s in text], default=len(text))]


@pytest.fixture
def fake():
    return FakeModel


@pytest.fixture
def guessing():
    """A model that draws a likelihood for every text, the same each time."""
    return FakeModel(lambda *text: -random.Random(str(text)).random())


@pytest.fixture
def prepared(tmp_path):
    """Tasks that are read by a configuration's fields."""

    def make(most_shots=0, max_bad_fraction=0.0, **fields):
        with RejectedLines(tmp_path / "rejected.jsonl") as rejected:
            return prepare(TasksConfig(**fields), most_shots, max_bad_fraction, rejected)

    return make


@pytest.fixture
def jsonl(tmp_path):
    """Writes records into a file and gives its path."""

    def write(name, *records):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        return str(path)

    return write
