"""AdamW and Lion against Optax's, what Muon does to a matrix, and schedules at their corners."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.config import from_dict
from jaxllm.errors import UserError
from jaxllm.training.optimizer import (
    OptimizerConfig,
    decayed,
    learning_rate_schedule,
    make_optimizer,
)

PARAMS = {
    "embedding": jnp.ones((3, 2)),
    "output": jnp.ones((2, 3)),
    "stack_0": {"layer_0": {"norm": {"scale": jnp.ones((2, 2))}, "mlp": {"kernel": jnp.ones(4)}}},
    "bias": jnp.ones(3),
    "position_embedding": jnp.ones((4, 2)),
}
DECAYED = {
    "embedding": True,
    "output": True,
    "stack_0": {"layer_0": {"norm": {"scale": False}, "mlp": {"kernel": True}}},
    "bias": False,
    "position_embedding": False,
}


def gradients(step):
    leaves, tree = jax.tree.flatten(PARAMS)
    keys = jax.random.split(jax.random.key(step), len(leaves))
    return tree.unflatten(
        [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    )


def test_only_matrices_are_decayed():
    assert decayed(PARAMS) == DECAYED


def test_muon_makes_the_matrices_of_layers_orthogonal_and_leaves_the_rest_to_adam():
    config = OptimizerConfig(name="muon", weight_decay=0.0, clip_norm=0.0)
    keys = jax.random.split(jax.random.key(0), 2)
    grads = {
        "embedding": jax.random.normal(keys[0], (6, 4)),
        "stack_0": {"mlp": {"kernel": jax.random.normal(keys[1], (3, 8, 16))}},
    }
    grads["stack_0"]["mlp"]["kernel"] *= jnp.array([1.0, 100.0, 0.01])[:, None, None]
    directions = one_update(config, grads)
    # Five Newton-Schulz steps bring every singular value near 1 in each layer of the stack,
    # whatever the size of its gradient; the scale is 0.2 √max(in, out).
    values = np.linalg.svd(directions["stack_0"]["mlp"]["kernel"], compute_uv=False)
    assert (values > 0.2 * 4 * 0.6).all()
    assert (values < 0.2 * 4 * 1.3).all()
    adam = one_update(OptimizerConfig(weight_decay=0.0, clip_norm=0.0), grads)
    np.testing.assert_allclose(directions["embedding"], adam["embedding"], rtol=1e-6)


def test_muon_treats_each_layer_of_a_stack_alone():
    config = OptimizerConfig(name="muon", weight_decay=0.0, clip_norm=0.0)
    stacked = jax.random.normal(jax.random.key(1), (2, 4, 6))
    both = one_update(config, {"kernel": stacked})["kernel"]
    for layer in range(2):
        alone = one_update(config, {"kernel": stacked[layer]})["kernel"]
        np.testing.assert_allclose(both[layer], alone, atol=1e-5)


def one_update(config, grads):
    optimizer = make_optimizer(config)
    params = jax.tree.map(jnp.zeros_like, grads)
    return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]


RATE = 0.05
DECAY = {"weight_decay": 0.3, "mask": DECAYED}


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({"name": "adamw", "eps": 1e-6}, optax.adamw(RATE, b1=0.8, b2=0.9, eps=1e-6, **DECAY)),
        ({"name": "lion"}, optax.lion(RATE, b1=0.8, b2=0.9, **DECAY)),
    ],
)
@pytest.mark.parametrize("clip_norm", [0.0, 0.7])
def test_five_steps_equal_those_of_optax(options, whole, clip_norm):
    shared = {"weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9, "clip_norm": clip_norm}
    ours = make_optimizer(OptimizerConfig(**shared, **options))
    theirs = whole
    if clip_norm:
        theirs = optax.chain(optax.clip_by_global_norm(clip_norm), whole)

    @jax.jit
    def step(params, state, expected, expected_state, grads):
        directions, state = ours.update(grads, state, params)
        params = jax.tree.map(lambda p, d: p - RATE * d, params, directions)
        updates, expected_state = theirs.update(grads, expected_state, expected)
        return params, state, optax.apply_updates(expected, updates), expected_state

    params = expected = PARAMS
    state, expected_state = ours.init(params), theirs.init(params)
    for number in range(5):
        params, state, expected, expected_state = step(
            params, state, expected, expected_state, gradients(number)
        )
    jax.tree.map(
        lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-6),
        params,
        expected,
    )


def test_gradients_are_clipped_to_the_norm_and_never_enlarged():
    # With beta1 = 0 and a huge eps, Adam passes its gradient on, divided by eps.
    config = OptimizerConfig(weight_decay=0.0, clip_norm=1.0, beta1=0.0, eps=1e6)
    optimizer = make_optimizer(config)

    def passed_on(gradient):
        params = {"kernel": jnp.zeros(2)}
        directions, _ = optimizer.update({"kernel": gradient}, optimizer.init(params), params)
        return np.asarray(directions["kernel"]) * 1e6

    np.testing.assert_allclose(passed_on(jnp.array([30.0, 40.0])), [0.6, 0.8], rtol=1e-5)
    np.testing.assert_allclose(passed_on(jnp.array([0.3, 0.4])), [0.3, 0.4], rtol=1e-5)


STEPS, WARMUP, PEAK, FINAL = 100, 10, 0.5, 0.1


@pytest.fixture(scope="module")
def rates():
    """The rate at each step from 0 to STEPS, by schedule."""

    def make(schedule, warmup=WARMUP):
        config = OptimizerConfig(
            learning_rate=PEAK, schedule=schedule, warmup_steps=warmup, final_fraction=FINAL
        )
        return np.asarray(
            jax.vmap(learning_rate_schedule(config, STEPS))(jnp.arange(STEPS + 1)), np.float64
        )

    return {
        (name, warmup): make(name, warmup)
        for name in ("cosine", "linear", "wsd", "constant")
        for warmup in (0, WARMUP)
    }


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_schedules_rise_to_the_peak_and_then_only_fall(rates, schedule):
    rate = rates[schedule, WARMUP]
    np.testing.assert_allclose(rate[WARMUP], PEAK, rtol=1e-6)
    np.testing.assert_allclose(rate[: WARMUP + 1], PEAK * np.arange(1, 12) / 11, rtol=1e-5)
    assert (np.diff(rate[WARMUP:]) <= 1e-9).all()
    end = PEAK if schedule == "constant" else PEAK * FINAL
    np.testing.assert_allclose(rate[STEPS], end, rtol=1e-5)
    np.testing.assert_allclose(rates[schedule, 0][0], PEAK, rtol=1e-6)
    np.testing.assert_allclose(rates[schedule, 0][STEPS], end, rtol=1e-5)


def test_schedules_between(rates):
    share = 0.25
    step = WARMUP + round(share * (STEPS - WARMUP) + 0.1)
    done = (step - WARMUP) / (STEPS - WARMUP)
    cosine = FINAL + (1 - FINAL) * (1 + np.cos(np.pi * done)) / 2
    np.testing.assert_allclose(rates["cosine", WARMUP][step], PEAK * cosine, rtol=1e-5)
    linear = 1 - (1 - FINAL) * done
    np.testing.assert_allclose(rates["linear", WARMUP][step], PEAK * linear, rtol=1e-5)
    np.testing.assert_allclose(rates["constant", WARMUP][step], PEAK, rtol=1e-6)
    # The last 20 of 100 steps decay.
    wsd = rates["wsd", WARMUP]
    np.testing.assert_allclose(wsd[WARMUP:81], PEAK, rtol=1e-6)
    np.testing.assert_allclose(wsd[90], PEAK * (1 + FINAL) / 2, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_a_run_shorter_than_its_warmup_has_a_schedule(schedule):
    config = OptimizerConfig(schedule=schedule, warmup_steps=20)
    rate = [float(learning_rate_schedule(config, 5)(step)) for step in range(6)]
    assert np.isfinite(rate).all()
    assert rate == sorted(rate)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd"}, r"config\.optimizer\.name: must be one of adamw, adafactor, lion, muon"),
        ({"schedule": "step"}, r"config\.optimizer\.schedule: must be one of cosine, linear"),
        ({"learning_rate": -1.0}, r"config\.optimizer\.learning_rate: must not be negative"),
        ({"beta2": 1.5}, r"config\.optimizer\.beta2: must be in \[0, 1\)"),
        (
            {"moment_dtype": "float16"},
            r"config\.optimizer\.moment_dtype: must be one of float32, b",
        ),
        (
            {"name": "adafactor", "moment_dtype": "bfloat16"},
            r"config\.optimizer\.moment_dtype: must be float32 for adafactor",
        ),
        ({"name": "adafactor", "beta1": 0.8}, r"config\.optimizer\.beta1: adafactor does not read"),
        ({"name": "adafactor", "beta2": 0.8}, r"config\.optimizer\.beta2: adafactor does not read"),
        ({"name": "adafactor", "eps": 1e-6}, r"config\.optimizer\.eps: adafactor does not read"),
        (
            {"name": "lion", "eps": 1e-6},
            r"config\.optimizer\.eps: lion does not read it, but only adamw, muon; leave "
            "it at 1e-08",
        ),
        ({"decay_fraction": 0.5}, r"config\.optimizer\.decay_fraction: cosine does not"),
        ({"learning_rate": float("nan")}, r"config\.optimizer\.learning_rate: must be a finite"),
    ],
)
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        from_dict(OptimizerConfig, changes, "optimizer")
