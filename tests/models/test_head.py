"""The head reads the last token of a text, or the mean of all, whatever else is in the row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.config import HeadConfig
from jaxllm.models.head import head_outputs, init_head, running_mean


def test_the_running_mean_is_that_of_each_text_alone():
    hidden = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
    positions = jnp.array([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]])
    found = running_mean(jnp.asarray(hidden), positions)
    for row, places in enumerate(positions.tolist()):
        for place, position in enumerate(places):
            expected = hidden[row, place - position : place + 1].mean(0)
            np.testing.assert_allclose(found[row, place], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_outputs_are_a_projection_of_what_is_pooled(pooling, tiny_model, tiny_params):
    model = tiny_model(head=HeadConfig(3, pooling))
    params = tiny_params(model)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, model.width)), jnp.float32)
    found = head_outputs(model, params, hidden, jnp.arange(4)[None])
    pooled = hidden[0, 3] if pooling == "last" else hidden[0].mean(0)
    expected = pooled @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(found[0, 3], expected, rtol=1e-4, atol=1e-5)


def test_a_new_head_gives_nothing_or_is_drawn(tiny_model):
    model = tiny_model(width=48, heads=2, head=HeadConfig(4000))
    none, drawn = init_head(model)["head"], init_head(model, jax.random.key(0))["head"]
    assert not none["kernel"].any()
    assert not drawn["bias"].any()
    assert drawn["kernel"].shape == none["kernel"].shape
    assert float(jnp.std(drawn["kernel"])) == pytest.approx(1 / 7, rel=0.01)  # 1/√(48 + 1)


def test_a_pooling_must_be_known():
    with pytest.raises(ValueError, match="pooling: must be one of last, mean"):
        HeadConfig(2, "max")
