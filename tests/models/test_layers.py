"""Single layers against hand-made answers."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.models.config import MlpConfig
from jaxllm.models.layers import GatedMlp, Linear, RMSNorm


def test_rms_norm_known_answer():
    x = jnp.array([[3.0, 4.0, 0.0, 0.0]])  # mean square 25/4
    out = RMSNorm(eps=0.0).apply({"params": {"scale": jnp.array([1.0, 2.0, 3.0, 4.0])}}, x)
    np.testing.assert_allclose(out, [[3 / 2.5, 2 * 4 / 2.5, 0, 0]], rtol=1e-6)
    out = RMSNorm(eps=1.0).apply({"params": {"scale": jnp.ones(4)}}, x)
    np.testing.assert_allclose(out, x / np.sqrt(25 / 4 + 1), rtol=1e-6)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    # Summed in bfloat16, the 511 ones beside 900 would be lost to its 8 bits.
    x = jnp.full((1, 512), 1.0, jnp.bfloat16).at[0, 0].set(30.0)
    out = RMSNorm(eps=0.0).apply({"params": {"scale": jnp.ones(512)}}, x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(out[0, 1]), 1 / np.sqrt((511 + 900) / 512), rtol=4e-3)


def test_linear_casts_its_float32_kernel_to_the_input():
    kernel = jnp.array([[1.0, 2.0, 0.5], [3.0, -1.0, 0.0]])
    params = {"params": {"kernel": kernel}}
    x = jnp.array([[1.0, 2.0]])
    np.testing.assert_array_equal(Linear(3).apply(params, x), [[7.0, 0.0, 0.5]])
    out = Linear(3).apply(params, x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    made = Linear(3).init(jax.random.key(0), x.astype(jnp.bfloat16))["params"]["kernel"]
    assert made.dtype == jnp.float32


def test_linear_begins_at_the_inverse_root_of_its_inputs_or_at_zero():
    x = jnp.ones((1, 256))
    kernel = jax.jit(Linear(512).init)(jax.random.key(0), x)["params"]["kernel"]
    np.testing.assert_allclose(np.std(kernel), 1 / 16, rtol=0.02)
    kernel = jax.jit(Linear(512, zero_init=True).init)(jax.random.key(0), x)["params"]["kernel"]
    np.testing.assert_array_equal(kernel, np.zeros((256, 512)))


def test_gated_mlp_known_answer():
    params = {
        "gate": {"kernel": jnp.array([[1.0, 0.0], [0.0, 2.0]])},
        "up": {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]])},
        "down": {"kernel": jnp.array([[1.0, 0.0], [1.0, 1.0]])},
    }
    x = jnp.array([[[1.0, -1.0]]])
    inner = [3 / (1 + np.exp(-1)), 2 / (1 + np.exp(2))]  # silu(gate) · up
    out = GatedMlp(MlpConfig(width=2)).apply({"params": params}, x)
    np.testing.assert_allclose(out[0, 0], [inner[0] + inner[1], inner[1]], rtol=1e-6)
