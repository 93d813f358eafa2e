"""The train step: split equals whole, and a step that is not finite changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.models.transformer import Transformer
from jaxllm.objectives.cross_entropy import CrossEntropyConfig
from jaxllm.objectives.next_token import next_token
from jaxllm.objectives.objective import Objective
from jaxllm.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from jaxllm.training.state import new_state
from jaxllm.training.step import (
    loss_and_gradients,
    make_train_step,
    sparing_step,
    weighted_loss,
)

SEQ = 8
LOSS = CrossEntropyConfig(z_loss=0.01, label_smoothing=0.2)
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_steps=2)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(layers=2)


@pytest.fixture(scope="module")
def batch(packed_rows):
    """Four rows of very unequal weight, one of them without any."""
    rows = packed_rows([[8], [3, 2], [6], [4]], SEQ)
    rows["loss_weights"] *= np.array([[1.0], [20.0], [0.0], [0.05]], np.float32)
    return rows


def whole_batch_loss(model, params, batch):
    """The loss written out over all logits at once."""
    output = Transformer(model).apply(
        {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    logits = output.hidden @ params["embedding"].T
    log_p = jax.nn.log_softmax(logits)
    labels = optax.smooth_labels(jax.nn.one_hot(batch["targets"], logits.shape[-1]), 0.2)
    per_token = -jnp.sum(labels * log_p, axis=-1)
    per_token += 0.01 * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.average(per_token, weights=batch["loss_weights"])


@pytest.fixture(scope="module")
def plain(model):
    return jax.jit(jax.value_and_grad(lambda params, batch: whole_batch_loss(model, params, batch)))


@pytest.fixture(scope="module")
def whole(plain, model, batch, tiny_params):
    return plain(tiny_params(model), batch)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_split_equals_whole(model, tiny_params, batch, whole, micro_batches):
    run = jax.jit(
        lambda params, batch: loss_and_gradients(
            next_token(model, LOSS), params, {}, batch, None, micro_batches
        )
    )
    loss, gradients, metrics = run(tiny_params(model), batch)
    np.testing.assert_allclose(loss, whole[0], rtol=1e-5)
    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5),
        gradients,
        dict(whole[1]),
    )
    assert float(metrics["loss"]) < float(loss)  # without smoothing and z-loss


def test_the_mean_of_means_would_differ(plain, model, tiny_params, batch, whole):
    means = []
    for row in range(len(batch["tokens"])):
        alone = np.arange(len(batch["tokens"]))[:, None] == row
        weights = batch["loss_weights"] * alone
        if weights.any():
            means.append(plain(tiny_params(model), batch | {"loss_weights": weights})[0])
    assert len(means) == 3
    assert abs(np.mean(means) - float(whole[0])) > 5e-4  # what split may differ by is 4e-5


def test_terms_are_weighed_each_by_its_own_total():
    objective = Objective({"a": 2.0, "b": 0.5, "c": 1.0}, lambda _: {}, lambda *_: ({}, {}))
    sums = {"a": jnp.float32(6.0), "b": jnp.float32(8.0), "c": jnp.float32(5.0)}
    totals = {"a": jnp.float32(3.0), "b": jnp.float32(2.0), "c": jnp.float32(0.0)}
    assert float(weighted_loss(objective, sums, totals)) == 2 * 6 / 3 + 0.5 * 8 / 2


@pytest.fixture(scope="module")
def train_step(model):
    schedule = learning_rate_schedule(OPTIMIZER, steps=10)
    return jax.jit(
        make_train_step(
            next_token(model, LOSS),
            make_optimizer(OPTIMIZER),
            schedule,
            micro_batches=2,
            seed=0,
        )
    )


@pytest.fixture
def state(model, tiny_params):
    params = tiny_params(model)
    return new_state(params, make_optimizer(OPTIMIZER).init(params))


def test_a_step_follows_the_negative_gradient_and_reports_it(train_step, state, batch, whole):
    after, metrics = train_step(state, {}, batch)
    np.testing.assert_allclose(metrics["objective"], whole[0], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(whole[1]), rtol=1e-4)
    assert float(metrics["tokens"]) == 8 + 5 + 6 + 4
    assert {m.dtype for m in metrics.values()} == {jnp.dtype("float32")}
    # The first step of Adam moves each parameter by the rate against the sign of its gradient.
    rate = metrics["learning_rate"]
    moved = (after.params["final_norm"]["scale"] - state.params["final_norm"]["scale"]) / rate
    np.testing.assert_allclose(moved, -np.sign(whole[1]["final_norm"]["scale"]), atol=1e-3)
    losses = [metrics["objective"]]
    for _ in range(4):
        after, metrics = train_step(after, {}, batch)
        losses.append(metrics["objective"])
    assert losses == sorted(losses, reverse=True)


def test_the_rate_follows_the_schedule_at_the_states_step(train_step, state, batch):
    schedule = learning_rate_schedule(OPTIMIZER, steps=10)
    for step in range(4):
        state, metrics = train_step(state, {}, batch)
        np.testing.assert_allclose(metrics["learning_rate"], schedule(step), rtol=1e-6)
        assert int(state.step) == step + 1


@pytest.mark.parametrize("fault", ["loss weights", "parameter"])
def test_a_step_that_is_not_finite_changes_only_the_counters(train_step, state, batch, fault):
    state, _ = train_step(state, {}, batch)
    if fault == "loss weights":
        faulty = batch | {"loss_weights": batch["loss_weights"] * np.float32(np.nan)}
    else:
        faulty = batch
        scale = state.params["final_norm"]["scale"].at[3].set(jnp.inf)
        state = state.replace(params=state.params | {"final_norm": {"scale": scale}})
    before = jax.device_get((state.params, state.opt_state))
    for skipped in (1, 2):
        state, metrics = train_step(state, {}, faulty)
        assert not np.isfinite(metrics["objective"])
        jax.tree.map(
            np.testing.assert_array_equal,
            before,
            jax.device_get((state.params, state.opt_state)),
        )
        assert int(state.step) == 1 + skipped
        assert int(state.skipped) == int(state.skipped_in_a_row) == skipped
        assert float(metrics["skipped"]) == float(metrics["skipped_in_a_row"]) == skipped
    if fault == "parameter":
        return
    state, metrics = train_step(state, {}, batch)
    assert np.isfinite(metrics["objective"])
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (4, 2, 0)
    assert (np.asarray(state.params["embedding"]) != before[0]["embedding"]).all()
    # Adam's own count leaves skipped steps out: its bias correction fits the moments it holds.
    assert int(optax.tree_utils.tree_get(state.opt_state, "count")) == 2


def test_a_model_stored_in_bfloat16_learns_as_one_in_float32_does(tiny_model, tiny_params, batch):
    options = OptimizerConfig(learning_rate=3e-3, moment_dtype="bfloat16")
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model = tiny_model(layers=1, param_dtype=dtype)
        optimizer = make_optimizer(options)
        step = jax.jit(
            make_train_step(
                next_token(model, LOSS),
                optimizer,
                optax.constant_schedule(options.learning_rate),
                micro_batches=2,
                seed=0,
            )
        )
        params = optax.tree.cast(tiny_params(tiny_model(layers=1)), dtype)
        state = new_state(params, optimizer.init(params))
        losses[dtype] = []
        for _ in range(20):
            state, metrics = step(state, {}, batch)
            losses[dtype].append(float(metrics["objective"]))
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.03)
    assert losses["float32"][-1] < 0.8 * losses["float32"][0]


def test_a_step_is_compiled_once_and_gives_back_what_that_took(state, batch, monkeypatch):
    events = []
    monkeypatch.setattr(
        "jaxllm.training.step.give_back_freed_memory", lambda: events.append("given back")
    )

    @jax.jit
    def same(state, frozen, batch):
        events.append("traced")
        jax.debug.callback(lambda: events.append("run"))
        return state, {"loss": jnp.zeros(())}

    # Arrays of this test's own: those of a fixture may carry the mesh of another test.
    state, batch = jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)), (state, batch))
    run = sparing_step(same)
    for _ in range(2):
        run(state, {}, batch)
    jax.effects_barrier()
    assert events == ["traced", "given back", "run", "run"]


@pytest.mark.parametrize(("large", "waits"), [(0, 2), (2**60, 0)])
def test_a_step_begins_when_large_temporaries_of_the_one_before_are_free(
    state, batch, monkeypatch, large, waits
):
    waited = []
    monkeypatch.setattr("jaxllm.training.step._LARGE", large)

    def wait(allocated):
        waited.append(allocated)
        return allocated

    monkeypatch.setattr("jaxllm.training.step.wait_until_freed", wait)

    @jax.jit
    def slow(state, frozen, batch):
        jax.debug.callback(lambda: done.append(len(waited)))
        product = jnp.ones((400, 400)) @ jnp.full((400, 400), state.step / 7)
        return dataclasses.replace(state, step=state.step + 1), {"loss": product.sum()}

    done = []
    state, batch = jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)), (state, batch))
    run = sparing_step(slow)
    for _ in range(3):
        state, _ = run(state, {}, batch)
    jax.effects_barrier()
    assert len(waited) == waits
    if waits:
        assert done == [0, 1, 2]  # none had begun before the wait for the one before it
