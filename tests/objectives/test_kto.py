"""KTO against NumPy in float64, and its reference point against rows built by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxllm.objectives import kto as kto_module
from jaxllm.objectives.dpo import DpoLossConfig
from jaxllm.objectives.kto import ReferencePoint, kto, mismatched
from jaxllm.objectives.responses import response_log_probs


def test_the_loss_of_single_responses(ragged, given_log_probs, agree, monkeypatch, tiny_model):
    batch, rankings, _ = ragged
    responses = [response for ranking in rankings for response in ranking]
    good = np.array([response.score > 0 for response in responses])
    assert 2 < good.sum() < len(good) - 2
    rng = np.random.default_rng(4)
    log_probs, others = -rng.uniform(0.2, 4, (2, *ragged.shape))

    monkeypatch.setattr(kto_module, "response_log_probs", given_log_probs)
    config = DpoLossConfig(loss="kto", beta=0.3, desirable=1.5, undesirable=0.7)
    reference = lambda params: params["reference"]  # noqa: E731
    point_of = ReferencePoint(tiny_model(), reference, SingleDeviceSharding(jax.devices()[0]))
    objective = kto(tiny_model(), config, reference, point_of)
    point = 0.8
    batch = batch | {"reference_point": jnp.full(ragged.shape, point)}

    def ratios(log_probs):
        return np.array([(log_probs - others)[r.row, r.places].sum() for r in responses])

    def expected(log_probs):
        moved = 0.3 * (ratios(log_probs) - point) * np.where(good, 1, -1)
        return np.mean(np.where(good, 1.5, 0.7) * (1 - 1 / (1 + np.exp(-moved))))

    params = {"log_probs": jnp.asarray(log_probs.ravel(), jnp.float32)}
    frozen = {"reference": {"log_probs": jnp.asarray(others.ravel(), jnp.float32)}}
    metrics = agree(objective, params, frozen, batch, expected)
    found = 0.3 * ratios(log_probs)
    np.testing.assert_allclose(metrics["better"], found[good].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["worse"], found[~good].mean(), rtol=1e-4)
    right = np.where(good, found > 0.3 * point, found < 0.3 * point)
    np.testing.assert_allclose(metrics["accuracy"], right.mean(), rtol=1e-5)


def test_responses_meet_the_other_prompts_of_their_row():
    rows = {
        # Prompts 1 2 | 5 | 8 8, responses 3 4 | 6 7 | 9; one prompt alone; one twice, and another.
        "tokens": [
            [1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 0, 0],
            [1, 2, 3, *[0] * 9],
            [1, 2, 3, 1, 2, 4, 5, 2, 6, 0, 0, 0],
        ],
        "segment_ids": [
            [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0],
            [1, 1, 1, *[0] * 9],
            [1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0, 0],
        ],
        "positions": [
            [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 0, 0],
            [0, 1, 2, *[0] * 9],
            [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0],
        ],
        "loss_weights": [
            [0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 0],
            [0, 1, 0, *[0] * 9],
            [0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0],
        ],
    }
    dtypes = {"loss_weights": jnp.float32}
    found = mismatched({n: jnp.asarray(a, dtypes.get(n, jnp.int32)) for n, a in rows.items()})
    np.testing.assert_array_equal(found["tokens"][0], [1, 2, 6, 7, 5, 9, 8, 8, 3, 4, 0, 0])
    np.testing.assert_array_equal(found["segment_ids"][0], [1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 0, 0])
    np.testing.assert_array_equal(found["positions"][0, :10], [0, 1, 2, 3, 0, 1, 0, 1, 2, 3])
    np.testing.assert_array_equal(found["loss_weights"][0], [0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0])
    learnt = np.asarray(found["loss_weights"][0]) > 0
    np.testing.assert_array_equal(np.asarray(found["targets"][0])[learnt], [6, 7, 9, 3, 4])
    assert not np.asarray(found["loss_weights"][1]).any()
    # What stands behind its own prompt is not learnt.
    np.testing.assert_array_equal(found["tokens"][2], [1, 2, 4, 1, 2, 6, 5, 2, 3, 0, 0, 0])
    np.testing.assert_array_equal(found["loss_weights"][2], [0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0])


def test_the_reference_point_is_of_mismatched_responses(laid_out, tiny_model, tiny_params):
    vocab_size, _, _, packed = laid_out
    model = tiny_model(vocab_size, layers=1)
    params = jax.tree.map(lambda x: x + 0.05, tiny_params(model))
    both = (params, jax.tree.map(lambda x: 0.9 * x, params))
    rows = [alone for row in range(len(packed["tokens"])) for alone in mismatches(packed, row)]
    assert len(rows) == 4
    batch = {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}
    policy, of_reference = (response_log_probs(model, p, batch)[0][:, 0] for p in both)
    wanted = float((policy - of_reference).mean())
    assert abs(wanted) > 1e-3
    sharding = SingleDeviceSharding(jax.devices()[0])
    # Once the policy and once the reference is taken for the other: one of both is above 0.
    for sign, (one, other) in ((1, both), (-1, both[::-1])):
        frozen = {"reference": other}
        found = []
        for parts in (1, 2):
            point = ReferencePoint(model, lambda p: p["reference"], sharding, parts)
            completed = point.of_batch(one, frozen, packed)
            assert completed.keys() == packed.keys() | {"reference_point"}
            found.append(completed)
        # In evaluation of all batches together.
        halves = [{name: array[half::2] for name, array in packed.items()} for half in (0, 1)]
        found += point.of_all(one, frozen, halves)
        points = np.concatenate([np.unique(np.asarray(each["reference_point"])) for each in found])
        np.testing.assert_allclose(points, max(sign * wanted, 0), rtol=1e-4)


def mismatches(packed, row):
    """Each response of a row in a row of its own, behind the prompt before its own, unless that is
    the same one."""
    tokens, segments, weights = (
        np.asarray(packed[name][row]) for name in ("tokens", "segment_ids", "loss_weights")
    )
    prompts, responses = [], []
    for segment in range(1, segments.max() + 1):
        (places,) = np.nonzero(segments == segment)
        size = int(np.nonzero(weights[places])[0][0]) + 1
        prompts.append(tokens[places[:size]])
        responses.append(tokens[places[size:]])
    for index, response in enumerate(responses):
        prompt = prompts[index - 1]
        if prompt.tolist() == prompts[index].tolist():
            continue
        ids = np.concatenate([prompt, response])
        alone = {name: np.zeros(64, np.int32) for name in ("tokens", "targets", "positions")}
        alone["segment_ids"] = np.zeros(64, np.int32)
        alone["loss_weights"] = np.zeros(64, np.float32)
        alone["tokens"][: len(ids)] = ids
        alone["targets"][: len(ids) - 1] = ids[1:]
        alone["positions"][: len(ids)] = np.arange(len(ids))
        alone["segment_ids"][: len(ids)] = 1
        alone["loss_weights"][len(prompt) - 1 : len(ids) - 1] = 1
        yield alone
