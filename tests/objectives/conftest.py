"""Rankings in rows, and the check of a loss and its gradient against NumPy."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.data.packing import packed_rows
from jaxllm.data.rankings import Rankings
from jaxllm.data.store import write_stores
from jaxllm.models.transformer import Output
from jaxllm.objectives.responses import response_sums
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer
from jaxllm.tokenizers.chat_template import chat_template
from jaxllm.training.step import loss_and_gradients


class Response(NamedTuple):
    """Where a response lies, and how good it is."""

    row: int
    places: np.ndarray
    """Where its tokens are predicted."""
    last: int
    """The place of its last token."""
    score: float


class Ragged(NamedTuple):
    """A batch, and the same rankings as lists of responses."""

    batch: dict[str, jax.Array]
    rankings: list[list[Response]]
    largest: int
    """Responses of a ranking at most."""

    @property
    def shape(self):
        return self.batch["tokens"].shape


@pytest.fixture(scope="session")
def ragged():
    """A batch of rankings of two to four responses, some of them equally good."""
    rows, seq, largest = 4, 40, 4
    rng = np.random.default_rng(7)
    batch = {
        name: np.zeros((rows, seq), np.int32)
        for name in ("targets", "positions", "segment_ids", "ranking_ids")
    }
    batch["tokens"] = np.arange(rows * seq, dtype=np.int32).reshape(rows, seq)  # each its own
    batch |= {
        name: np.zeros((rows, seq), np.float32)
        for name in ("loss_weights", "scores", "reference_log_probs")
    }
    rankings = []
    for row in range(rows):
        place = segment = 0
        for number in range(1, 4):
            scores = rng.integers(0, 3, 2 + len(rankings) % (largest - 1)).astype(float)
            prompt, lengths = rng.integers(1, 4), rng.integers(1, 5, len(scores))
            if place + (prompt + lengths).sum() > seq or (row == rows - 1 and number > 1):
                break
            ranking = []
            for score, length in zip(scores, lengths, strict=True):
                span, segment = slice(place, place + prompt + length), segment + 1
                batch["positions"][row, span] = np.arange(prompt + length)
                batch["segment_ids"][row, span] = segment
                batch["ranking_ids"][row, span] = number
                batch["scores"][row, span] = score
                # The first token of a response is predicted at the prompt's last place.
                places = np.arange(place + prompt - 1, place + prompt + length - 1)
                batch["loss_weights"][row, places] = 1
                batch["reference_log_probs"][row, span.stop - 1] = -rng.uniform(1, 9)
                ranking.append(Response(row, places, span.stop - 1, score))
                place = span.stop
            rankings.append(ranking)
    assert {len(ranking) for ranking in rankings} == {2, 3, 4}
    assert any(len({r.score for r in ranking}) == 1 for ranking in rankings)  # nothing preferred
    return Ragged({name: jnp.asarray(array) for name, array in batch.items()}, rankings, largest)


@pytest.fixture(scope="session")
def laid_out(tmp_path_factory):
    """The same rankings in rows of their own, and packed."""
    tokenizer = ByteTokenizer()
    encoder = Rankings(chat_template(tokenizer, "bos_separated"), 32)
    rankings = [
        {
            "messages": [{"role": "user", "content": prompt}],
            "responses": responses,
            "scores": scores,
        }
        for prompt, responses, scores in (
            ("ab", ["c", "defg", "hi"], [2, 1, 0]),
            ("j", ["kl", "mnop"], [1, 0]),
            ("q", ["r", "s"], [0, 1]),
            ("tu", ["vw", "x"], [0.5, 0]),
            ("y", ["z", "abc", "d"], [1, 0, 1]),
        )
    ]
    named = [("all", json.dumps(ranking)) for ranking in rankings]
    folder = tmp_path_factory.mktemp("stores") / "store"
    store = write_stores(folder, ["all"], named, tokenizer, "", encoder=encoder)["all"]
    references = [-np.arange(1, 13, dtype=np.float32)]

    def batch(packing):
        rows = packed_rows(store, packing, 32, part_values={"reference_log_probs": references})
        found = [rows[number] for number in range(len(rows))]
        found += [rows.empty()] * (-len(found) % 4)
        return {n: jnp.asarray(np.stack([row[n] for row in found])) for n in found[0]}

    return tokenizer.vocab_size, store.most_parts, batch("none"), batch("best_fit")


@pytest.fixture(scope="session")
def given_log_probs():
    """In place of `response_log_probs`: those that `params` hold of each place of a batch."""

    def found(model, params, batch):
        sums = response_sums(batch["loss_weights"] * params["log_probs"][batch["tokens"]], batch)
        return sums, Output(jnp.zeros((*batch["tokens"].shape, 1)), None, None)

    return found


@pytest.fixture(scope="session")
def agree():
    """Checks loss and gradient, by micro-batches too, and returns the metrics."""

    def check(objective, params, frozen, batch, expected):
        """`params` hold one array, of each place; `expected` is the loss as a function of it."""
        ((name, values),) = params.items()
        places = np.asarray(values, np.float64).reshape(batch["tokens"].shape)
        wanted = finite_differences(expected, places)
        for micro_batches in (1, 2, 4):
            loss, gradient, metrics = jax.jit(
                lambda params, batch, m=micro_batches: loss_and_gradients(
                    objective, params, frozen, batch, None, m
                )
            )(params, batch)
            np.testing.assert_allclose(loss, expected(places), rtol=1e-5)
            np.testing.assert_allclose(
                gradient[name].reshape(places.shape), wanted, rtol=2e-4, atol=1e-6
            )
        return metrics

    return check


def finite_differences(function, values, step=1e-6):
    gradient = np.zeros_like(values)
    for index in np.ndindex(values.shape):
        moved = values.copy()
        moved[index] += step
        above = function(moved)
        moved[index] -= 2 * step
        gradient[index] = (above - function(moved)) / (2 * step)
    return gradient
