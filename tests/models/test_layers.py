"""Single layers against hand-made answers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.config import DTypes, MixtureConfig, MlpConfig, NormConfig
from jaxllm.models.layers import Mixture, Mlp
from jaxllm.models.parts import Linear, Norm, dropout

WIDE = DTypes(params="float32", compute="float32", reduction="float32")


def norm(x, params, **config):
    return Norm(NormConfig(**{"kind": "rms", "eps": 0.0} | config), WIDE).apply(
        {"params": params}, x
    )


def test_rms_norm_known_answer():
    x = jnp.array([[3.0, 4.0, 0.0, 0.0]])  # mean square 25/4
    out = norm(x, {"scale": jnp.array([1.0, 2.0, 3.0, 4.0])})
    np.testing.assert_allclose(out, [[3 / 2.5, 2 * 4 / 2.5, 0, 0]], rtol=1e-6)
    out = norm(x, {"scale": jnp.ones(4)}, eps=1.0)
    np.testing.assert_allclose(out, x / np.sqrt(25 / 4 + 1), rtol=1e-6)


def test_an_offset_is_added_to_the_scale():
    x = jax.random.normal(jax.random.key(0), (2, 4))
    scale = jnp.array([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(
        norm(x, {"scale": scale - 1}, offset=1.0), norm(x, {"scale": scale}), rtol=1e-6
    )


def test_layer_norm_known_answer():
    x = jnp.array([[1.0, 3.0]])  # mean 2, variance 1
    params = {"scale": jnp.array([2.0, 5.0]), "bias": jnp.array([0.5, 0.0])}
    np.testing.assert_allclose(norm(x, params, kind="layer"), [[-1.5, 5.0]], rtol=1e-6)
    out = norm(x, params, kind="layer", eps=3.0)
    np.testing.assert_allclose(out, [[-0.5, 2.5]], rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("zero_init", "begins"), [(False, 1.0), (True, 0.0)])
def test_a_norm_begins_as_asked_for(offset, zero_init, begins):
    module = Norm(NormConfig("rms", 1e-6, offset), WIDE, zero_init=zero_init)
    x = jnp.ones((1, 8))
    np.testing.assert_allclose(module.init_with_output(jax.random.key(0), x)[0], begins, rtol=1e-5)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    # Summed in bfloat16, the 511 ones beside 900 would be lost to its 8 bits.
    x = jnp.full((1, 512), 1.0, jnp.bfloat16).at[0, 0].set(30.0)
    out = norm(x, {"scale": jnp.ones(512)})
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(out[0, 1]), 1 / np.sqrt((511 + 900) / 512), rtol=4e-3)


def test_linear_casts_its_kernel_to_the_input():
    kernel = jnp.array([[1.0, 2.0, 0.5], [3.0, -1.0, 0.0]])
    params = {"params": {"kernel": kernel}}
    x = jnp.array([[1.0, 2.0]])
    np.testing.assert_array_equal(Linear(3, WIDE).apply(params, x), [[7.0, 0.0, 0.5]])
    out = Linear(3, WIDE).apply(params, x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    out = Linear(3, WIDE, result_dtype="float32").apply(params, x.astype(jnp.bfloat16))
    assert out.dtype == jnp.float32
    biased = {"params": {"kernel": kernel, "bias": jnp.array([1.0, 0.0, -1.0])}}
    np.testing.assert_array_equal(Linear(3, WIDE, bias=True).apply(biased, x), [[8.0, 0.0, -0.5]])


@pytest.mark.parametrize("params", ["float32", "bfloat16"])
def test_parameters_have_their_dtype_whatever_the_input(params):
    module = Linear(3, DTypes(params, "bfloat16", "float32"), bias=True)
    made = module.init(jax.random.key(0), jnp.ones((1, 2), jnp.bfloat16))["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(params)}


def test_linear_begins_at_the_inverse_root_of_its_inputs_or_at_zero():
    x = jnp.ones((1, 256))
    kernel = jax.jit(Linear(512, WIDE).init)(jax.random.key(0), x)["params"]["kernel"]
    np.testing.assert_allclose(np.std(kernel), 1 / 16, rtol=0.02)
    zero = jax.jit(Linear(512, WIDE, zero_init=True).init)(jax.random.key(0), x)
    np.testing.assert_array_equal(zero["params"]["kernel"], np.zeros((256, 512)))


MLP = {
    "gate": {"kernel": jnp.array([[1.0, 0.0], [0.0, 2.0]])},
    "up": {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]])},
    "down": {"kernel": jnp.array([[1.0, 0.0], [1.0, 1.0]])},
}


def test_gated_mlp_known_answer():
    x = jnp.array([[[1.0, -1.0]]])
    inner = [3 / (1 + np.exp(-1)), 2 / (1 + np.exp(2))]  # silu(gate) · up
    config = MlpConfig(2, "silu", gated=True, bias=False)
    out = Mlp(config, WIDE).apply({"params": MLP}, x)
    np.testing.assert_allclose(out[0, 0], [inner[0] + inner[1], inner[1]], rtol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_plain_mlp_known_answer(activation):
    x = jnp.array([[[1.0, -1.0]]])
    config = MlpConfig(2, activation, gated=False, bias=False)
    out = Mlp(config, WIDE).apply({"params": {name: MLP[name] for name in ("up", "down")}}, x)
    # x · Φ(x) at 3 and -1, whose exact values the tanh form meets to four digits.
    inner = [3 * 0.9986501, -1 * 0.1586553]
    exact = activation == "gelu"
    np.testing.assert_allclose(
        out[0, 0], [inner[0] + inner[1], inner[1]], rtol=1e-6 if exact else 2e-2
    )
    approximate = np.asarray(nn.gelu(jnp.array([3.0, -1.0]), approximate=True))
    assert np.allclose(out[0, 0, 1], approximate[1], rtol=1e-6) is not exact


def test_a_mixture_is_the_weighted_sum_of_its_best_experts():
    config = MixtureConfig(4, 2, 3, "silu", True, load_balance_loss=1.0, router_z_loss=1.0)
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    segments = jnp.array([[1, 1, 1, 0, 0], [1, 1, 2, 2, 2]])
    module = Mixture(config, WIDE, zero_init=False)
    params = module.init(jax.random.key(1), x, segments)["params"]
    out, losses = jax.jit(module.apply)({"params": params}, x, segments)

    scores = np.asarray(x, np.float64) @ np.asarray(params["router"]["kernel"], np.float64)
    kernels = {name: np.asarray(params["experts"][name]["kernel"], np.float64) for name in MLP}
    expected = np.zeros(x.shape)
    for place in np.ndindex(2, 5):
        chosen = np.argsort(-scores[place])[:2]
        weights = np.exp(scores[place][chosen]) / np.exp(scores[place][chosen]).sum()
        for weight, expert in zip(weights, chosen, strict=True):
            gate, up = (x[place] @ kernels[name][expert] for name in ("gate", "up"))
            inner = gate / (1 + np.exp(-gate)) * up
            expected[place] += weight * (inner @ kernels["down"][expert])
    np.testing.assert_allclose(out, expected, atol=1e-5)
    # Only what is no padding counts in the losses.
    z = np.log(np.exp(scores).sum(-1)) ** 2
    np.testing.assert_allclose(losses.router_z, [z[0, :3].sum(), z[1].sum()], rtol=1e-5)


def test_dropout_zeroes_a_share_of_each_row_and_keeps_the_mean():
    x = jnp.ones((3, 400, 16))
    keys = jax.random.split(jax.random.key(0), 3)
    out = np.asarray(dropout(x, 0.25, keys, "place"))
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    np.testing.assert_allclose((out == 0).mean(axis=(1, 2)), 0.25, atol=0.02)
    assert (out[0] != out[1]).any()
    assert (out != np.asarray(dropout(x, 0.25, keys, "elsewhere"))).any()
    # A row's draw is its own, whichever rows stand beside it.
    np.testing.assert_array_equal(dropout(x[1:], 0.25, keys[1:], "place"), out[1:])
    for unchanged in (dropout(x, 0.25, None, "place"), dropout(x, 0.0, keys, "place")):
        assert unchanged is x
