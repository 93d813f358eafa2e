"""Next-token prediction against the plain formula, and packed against unpacked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import from_dict
from jaxllm.errors import UserError
from jaxllm.models.transformer import Transformer, output_head
from jaxllm.objectives.cross_entropy import CrossEntropyConfig
from jaxllm.objectives.next_token import next_token
from jaxllm.training.step import loss_and_gradients

SEQ = 12
FULL = CrossEntropyConfig(z_loss=0.01, label_smoothing=0.2)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(layers=2)


@pytest.fixture(scope="module")
def evaluate(model):
    """Jitted `(config, params, batch) -> (loss, gradients, metrics)`."""

    def run(config, params, batch):
        return loss_and_gradients(next_token(model, config), params, {}, batch, None, 1)

    return jax.jit(run, static_argnums=0)


def test_equals_the_formula_in_numpy(model, tiny_params, packed_rows, evaluate):
    params = tiny_params(model)
    batch = packed_rows([[7, 5], [9]], SEQ)
    batch["loss_weights"] *= np.random.default_rng(0).uniform(0, 2, batch["loss_weights"].shape)
    hidden = jax.jit(Transformer(model).apply)(
        {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"]
    ).hidden
    matrix = output_head(model, params).matrix
    logits = np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64)
    log_z = np.log(np.exp(logits).sum(axis=-1))
    log_p = logits - log_z[..., None]
    target = np.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
    weights = batch["loss_weights"] / batch["loss_weights"].sum()
    plain = -(weights * target).sum()
    smooth = (weights * (-0.8 * target - 0.2 * log_p.mean(axis=-1))).sum()
    z_loss = 0.01 * (weights * log_z**2).sum()

    loss, _, metrics = evaluate(FULL, params, batch)
    np.testing.assert_allclose(loss, smooth + z_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], plain, rtol=1e-5)
    loss, _, metrics = evaluate(CrossEntropyConfig(), params, batch)
    np.testing.assert_allclose(loss, plain, rtol=1e-5)
    assert len({round(float(x), 4) for x in (plain, smooth, smooth + z_loss)}) == 3


def test_packed_documents_give_the_loss_and_gradient_they_give_alone(
    model, tiny_params, packed_rows, evaluate
):
    params = tiny_params(model)
    packed = packed_rows([[5, 3, 4], [2, 6]], SEQ)
    alone = {name: np.zeros((5, SEQ), array.dtype) for name, array in packed.items()}
    documents = [(0, 0, 5), (0, 5, 3), (0, 8, 4), (1, 0, 2), (1, 2, 6)]
    for row, (source, begin, length) in enumerate(documents):
        for name, array in alone.items():
            array[row, :length] = packed[name][source, begin : begin + length]
    alone["segment_ids"] = np.minimum(alone["segment_ids"], 1)
    together, separate = evaluate(FULL, params, packed), evaluate(FULL, params, alone)
    for found, expected in zip(jax.tree.leaves(together), jax.tree.leaves(separate), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    # Without the mask between documents the answer is another: the test can fail.
    packed["segment_ids"] = np.minimum(packed["segment_ids"], 1)
    packed["positions"] = np.broadcast_to(np.arange(SEQ, dtype=np.int32), (2, SEQ))
    assert abs(float(evaluate(FULL, params, packed)[0] - separate[0])) > 1e-3


def test_what_stands_where_the_weight_is_0_does_not_matter(
    model, tiny_params, packed_rows, evaluate
):
    params = tiny_params(model)
    batch = packed_rows([[5, 3], [4]], SEQ)
    before = evaluate(FULL, params, batch)
    unweighted = batch["loss_weights"] == 0
    batch["targets"] = np.where(unweighted, 31, batch["targets"])
    batch["tokens"] = np.where(batch["segment_ids"] == 0, 17, batch["tokens"])
    jax.tree.map(np.testing.assert_array_equal, before, evaluate(FULL, params, batch))


def test_a_batch_without_weight_gives_0_not_nan(model, tiny_params, packed_rows, evaluate):
    batch = packed_rows([[5], [4]], SEQ)
    batch["loss_weights"] *= 0
    for leaf in jax.tree.leaves(evaluate(FULL, tiny_params(model), batch)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_frozen_parameters_get_no_gradient_and_are_used(model, tiny_params, packed_rows, evaluate):
    params, batch = tiny_params(model), packed_rows([[5], [4]], SEQ)
    loss, gradients, _ = evaluate(FULL, params, batch)
    trained = {"final_norm": params["final_norm"]}
    frozen = {name: value for name, value in params.items() if name != "final_norm"}
    partly, some, _ = jax.jit(
        lambda *args: loss_and_gradients(next_token(model, FULL), *args, None, 1)
    )(trained, frozen, batch)
    np.testing.assert_allclose(partly, loss, rtol=1e-6)
    assert set(some) == {"final_norm"}
    np.testing.assert_allclose(
        some["final_norm"]["scale"], gradients["final_norm"]["scale"], rtol=1e-5, atol=1e-7
    )


def test_bfloat16_compute_keeps_loss_and_gradients_float32(tiny_model, tiny_params, packed_rows):
    model = tiny_model(layers=2, dtype="bfloat16")
    params = tiny_params(tiny_model(layers=2))
    shapes = jax.eval_shape(
        lambda params, batch: loss_and_gradients(
            next_token(model, FULL), params, {}, batch, None, 1
        ),
        params,
        packed_rows([[5], [4]], SEQ),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z_loss": -1.0}, r"config\.objective\.z_loss: must not be negative"),
        ({"label_smoothing": 1.0}, r"config\.objective\.label_smoothing: must be in \[0, 1\)"),
    ],
)
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        from_dict(CrossEntropyConfig, changes, "objective")
