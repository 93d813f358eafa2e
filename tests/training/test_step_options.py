"""What a step does beside following the gradient: draws by row, rates by path, the average of
parameters, and parameters in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxllm.objectives.objective import Objective
from jaxllm.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from jaxllm.training.optimizer import OptimizerConfig, make_optimizer
from jaxllm.training.state import new_state
from jaxllm.training.step import (
    init_state,
    jit_step,
    loss_and_gradients,
    make_train_step,
    row_keys,
    state_shapes,
)

ROWS = 8
BATCH = {"segment_ids": jnp.ones((ROWS, 2), jnp.int32), "size": jnp.arange(ROWS, dtype="float32")}
PARAMS = {"a": {"kernel": jnp.full((4, 8), 0.5)}, "b": {"scale": jnp.ones(8)}}
# With beta1 = 0 and a huge eps, the direction of Adam is nearly its gradient over eps.
OPTIMIZER = OptimizerConfig(weight_decay=0.0, clip_norm=0.0, beta1=0.0, eps=1e6)


def drawing():
    """The mean over rows of the row's size · a draw of its own · params."""

    def sums(params, batch, frozen, row_keys):
        size = batch["size"][:, None]
        noise = jax.vmap(lambda key: jax.random.normal(key, (8,)))(row_keys)
        weights = params["a"]["kernel"].sum(axis=0) * params["b"]["scale"]
        loss = jnp.sum((size * noise) @ weights)
        return {"drawn": loss}, {"loss": (loss, jnp.float32(len(size)))}

    return Objective({"drawn": 1.0}, lambda batch: {"drawn": jnp.float32(ROWS)}, sums)


def pulling():
    """Σ params · size, whose gradient is the mean size of the rows everywhere."""

    def sums(params, batch, frozen, row_keys):
        total = sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(params))
        loss = total * jnp.sum(batch["size"])
        return {"pull": loss}, {"loss": (loss, jnp.float32(1))}

    return Objective({"pull": 1.0}, lambda batch: {"pull": jnp.float32(ROWS)}, sums)


def trainer(objective, config=OPTIMIZER, rate=1e6, params=PARAMS, averaged=False, **options):
    """The state before the first step, and the jitted step."""
    optimizer = make_optimizer(config)
    step = make_train_step(
        objective,
        optimizer,
        optax.constant_schedule(rate),
        **{"micro_batches": 1, "seed": 3} | options,
    )
    return new_state(params, optimizer.init(params), averaged), jax.jit(step)


@pytest.fixture(scope="module")
def whole():
    keys = row_keys(3, 5, ROWS)
    return loss_and_gradients(drawing(), PARAMS, {}, BATCH, keys, 1)


def test_a_row_draws_by_its_place_in_the_batch_and_the_step():
    keys = row_keys(3, 5, ROWS)
    for row in range(ROWS):
        assert keys[row] == jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 5), row)
    for seed, step in ((3, 6), (4, 5)):
        assert not np.intersect1d(
            jax.random.key_data(keys)[:, 0], jax.random.key_data(row_keys(seed, step, ROWS))[:, 0]
        ).size


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_what_rows_draw_does_not_depend_on_micro_batches(whole, micro_batches):
    keys = row_keys(3, 5, ROWS)
    found = loss_and_gradients(drawing(), PARAMS, {}, BATCH, keys, micro_batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, whole)
    other = loss_and_gradients(drawing(), PARAMS, {}, BATCH, row_keys(3, 6, ROWS), micro_batches)
    assert abs(float(other[0] - whole[0])) > 1e-2


@pytest.mark.parametrize(
    ("config", "micro_batches"),
    [
        (MeshConfig(data=8), 1),
        (MeshConfig(data=1, fsdp=4, tensor=2), 1),
        (MeshConfig(data=1, fsdp=4, tensor=2), 2),
    ],
)
def test_what_rows_draw_does_not_depend_on_the_mesh(config, micro_batches):
    state, step = trainer(drawing())
    expected, metrics = step(state, {}, BATCH)
    mesh = make_mesh(config)
    optimizer = make_optimizer(OPTIMIZER)
    rules = [("a/kernel", P("fsdp", "tensor")), ("b/scale", P())]
    shapes = state_shapes(jax.eval_shape(lambda: PARAMS), optimizer, rules, mesh)
    _, step = trainer(drawing(), micro_batches=micro_batches)
    with jax.set_mesh(mesh):
        layout = jax.tree.map(lambda shape: shape.sharding, shapes.params)
        params = jax.device_put(jax.device_get(PARAMS), layout)
        begin = init_state(params, optimizer, shapes)
        rows = jax.device_put(BATCH, batch_sharding(mesh))
        found, measured = jit_step(step, shapes, mesh)(begin, {}, rows)
    np.testing.assert_allclose(measured["loss"], metrics["loss"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4),
        jax.device_get(found.params),
        jax.device_get(expected.params),
    )


def test_factors_scale_the_rate_of_their_parameters_with_its_weight_decay():
    config = OptimizerConfig(weight_decay=0.3)
    moved = {}
    for factors in ((), ((".*kernel", 0.25), (".*scale", 2.0)), ((".*kernel", 0.0),)):
        state, step = trainer(pulling(), config, rate=0.01, factors=factors)
        after, metrics = step(state, {}, BATCH)
        assert float(metrics["learning_rate"]) == np.float32(0.01)
        difference = jax.tree.map(jnp.subtract, after.params, state.params)
        moved[factors] = difference["a"]["kernel"], difference["b"]["scale"]
    plain, scaled, held = moved.values()
    np.testing.assert_allclose(plain[0], -0.01 * (1 + 0.3 * 0.5), rtol=1e-5)
    np.testing.assert_allclose(plain[1], -0.01, rtol=1e-5)
    np.testing.assert_allclose(scaled[0], 0.25 * plain[0], rtol=1e-5)
    np.testing.assert_allclose(scaled[1], 2 * plain[1], rtol=1e-5)
    np.testing.assert_array_equal(held[0], 0)
    np.testing.assert_array_equal(held[1], plain[1])


def test_layers_of_one_stack_have_rates_of_their_own():
    config = OptimizerConfig(weight_decay=0.0)
    state, step = trainer(pulling(), config, rate=0.01)
    plain = jax.tree.map(jnp.subtract, step(state, {}, BATCH)[0].params, state.params)
    rows = state.params["a"]["kernel"].shape[0]
    by_layer = {"a/kernel": np.linspace(0, 1, rows, dtype=np.float32).reshape(-1, 1)}
    state, step = trainer(pulling(), config, rate=0.01, by_layer=by_layer)
    moved = jax.tree.map(jnp.subtract, step(state, {}, BATCH)[0].params, state.params)
    expected = by_layer["a/kernel"] * plain["a"]["kernel"]
    np.testing.assert_allclose(moved["a"]["kernel"], expected, rtol=1e-5)
    np.testing.assert_array_equal(moved["b"]["scale"], plain["b"]["scale"])


def test_the_average_of_parameters_follows_them_and_skips_what_they_skip():
    ema = 0.35
    state, step = trainer(pulling(), OptimizerConfig(), rate=0.01, averaged=True, ema=ema)
    assert state.evaluation_params is not state.params
    expected = np.asarray(state.params["a"]["kernel"], np.float64)
    updates = 0
    for bad in (False, False, True, False, False, False):
        size = BATCH["size"] * (jnp.nan if bad else 1)
        before = jax.device_get(state.average)
        state, metrics = step(state, {}, BATCH | {"size": size})
        if bad:
            assert int(metrics["skipped"]) == 1
            jax.tree.map(np.testing.assert_array_equal, state.average, before)
            continue
        decay = min(ema, (1 + updates) / (10 + updates))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["a"]["kernel"])
        updates += 1
        np.testing.assert_allclose(state.average["a"]["kernel"], expected, rtol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, state.evaluation_params, state.average)
    assert (1 + updates - 1) / (10 + updates - 1) > ema  # both sides of the minimum were seen
    assert np.abs(expected - np.asarray(state.params["a"]["kernel"])).min() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_average_begins_as_the_parameters_in_memory_of_its_own(dtype):
    params = jax.tree.map(lambda leaf: jnp.array(leaf, dtype), PARAMS)
    state = jax.jit(lambda params: new_state(params, {}, averaged=True))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.average)} == {jnp.dtype("float32")}
    after = jax.jit(lambda state: state, donate_argnums=0)(state)
    jax.tree.map(np.testing.assert_array_equal, after.average, PARAMS)
    # What is scored is what a checkpoint gives on: in the dtype of the parameters.
    assert {leaf.dtype for leaf in jax.tree.leaves(after.evaluation_params)} == {jnp.dtype(dtype)}


def test_without_an_average_the_parameters_are_evaluated():
    state, step = trainer(pulling())
    after, _ = step(state, {}, BATCH)
    assert after.average is None
    assert after.evaluation_params is after.params


def test_parameters_in_bfloat16_move_by_less_than_they_can_hold_in_the_mean():
    """Each step moves by 1/2000 of a value: to the nearest bfloat16, it would never move."""
    params = {"kernel": jnp.ones((64, 64), jnp.bfloat16)}
    state, step = trainer(pulling(), rate=1e6 * 0.0005 / 3.5, params=params, averaged=True, ema=0.9)
    exact = jnp.ones(()).astype(jnp.float32)
    for _ in range(20):
        state, _ = step(state, {}, BATCH)
        exact -= 0.0005
        assert state.params["kernel"].dtype == jnp.bfloat16
        assert state.average["kernel"].dtype == jnp.float32
    found = np.asarray(state.params["kernel"], np.float32)
    assert len(np.unique(found)) > 2
    np.testing.assert_allclose(found.mean(), exact, atol=5e-4)
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(state.opt_state))
    assert float(state.average["kernel"].mean()) > found.mean()


def test_gradients_of_parameters_in_bfloat16_are_added_up_in_float32():
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    # 64 and 0.75 are bfloat16 numbers; 64.75 is not, and would make the sum 66.
    batch = BATCH | {"size": jnp.array([512.0, 6, 6, 0, 0, 0, 0, 0])}
    _, gradients, _ = loss_and_gradients(pulling(), params, {}, batch, None, 8)
    assert gradients["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(gradients["kernel"], 65.5, rtol=1e-6)


def test_a_step_rounds_by_its_number_and_can_be_made_again():
    params = {"kernel": jnp.ones((64, 64), jnp.bfloat16)}
    config = OptimizerConfig(moment_dtype="bfloat16")
    state, step = trainer(pulling(), config, rate=0.001, params=params)
    first, _ = step(state, {}, BATCH)
    again, _ = step(state, {}, BATCH)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    later, _ = step(state.replace(step=jnp.int32(1)), {}, BATCH)
    assert (later.params["kernel"] != first.params["kernel"]).any()
    moments = [leaf for leaf in jax.tree.leaves(first.opt_state) if leaf.ndim]
    assert {moment.dtype for moment in moments} == {jnp.dtype("bfloat16")}
