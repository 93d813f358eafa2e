"""Loss over evaluation batches, and the scores that follow from it."""

import math

import jax.numpy as jnp
import pytest

from jaxllm.data.store import TokenStore, write_stores
from jaxllm.evaluation.loss import LossEvaluator, text_scores
from jaxllm.objectives.objective import Objective
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.training import train_tokenizer


@pytest.fixture
def store(tmp_path) -> TokenStore:
    """Two documents of 3 and 5 bytes, each byte one token: 5 + 7 tokens with their two marks."""
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=273), ["xyz"])
    texts = (("all", text) for text in ("abc", "defgh"))
    return write_stores(tmp_path / "store", ["all"], texts, tokenizer, "fingerprint")["all"]


def test_scores_of_a_known_loss(store):
    assert store.num_predicted == (3 + 1) + (5 + 1)
    scores = text_scores(math.log(2), store)
    assert scores["eval/loss"] == math.log(2)
    assert scores["eval/perplexity"] == pytest.approx(2)
    assert scores["eval/bits_per_byte"] == pytest.approx(10 / 8)  # a bit a token, 10 for 8 bytes


def test_uniform_guessing_among_bytes_costs_eight_bits_each(store):
    scores = text_scores(math.log(256), store)
    assert scores["eval/bits_per_byte"] * store.num_bytes == pytest.approx(8 * 10)


def test_a_loss_beyond_floats_has_a_finite_perplexity(store):
    assert math.isfinite(text_scores(1e6, store)["eval/perplexity"])


def _mean_objective() -> Objective:
    def sums(params, batch, frozen, rng):
        weight = jnp.sum(batch["weights"])
        total = jnp.sum(batch["weights"] * batch["values"]) * params["scale"]
        return {}, {"loss": (total, weight), "half": (total / 2, weight)}

    return Objective({}, lambda batch: {}, sums)


def _batch(values, weights):
    return {"values": jnp.asarray(values, float), "weights": jnp.asarray(weights, float)}


def test_batches_weigh_what_they_count():
    evaluate = LossEvaluator(_mean_objective())
    batches = [_batch([1, 9], [1, 0]), _batch([4, 6], [1, 2])]
    means = evaluate({"scale": jnp.float32(1)}, {}, batches)
    assert means["loss"] == (pytest.approx((1 + 4 + 12) / 4), 4)
    assert means["half"] == (pytest.approx((1 + 4 + 12) / 8), 4)


def test_no_weight_gives_nan_and_no_batches_an_error():
    evaluate = LossEvaluator(_mean_objective())
    loss, weight = evaluate({"scale": jnp.float32(1)}, {}, [_batch([1, 2], [0, 0])])["loss"]
    assert math.isnan(loss)
    assert weight == 0
    with pytest.raises(ValueError, match="no evaluation batches"):
        evaluate({"scale": jnp.float32(1)}, {}, [])
