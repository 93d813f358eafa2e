"""Options of on-policy runs: what they train, and what they leave as it is."""

import json
import re
import signal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import trees
from jaxllm.checkpoints.load import load_model
from jaxllm.data.rankings import ResponseIds
from jaxllm.inference.reward_model import load_reward_model
from jaxllm.main import main
from jaxllm.models.transformer import Transformer, output_head, param_shapes
from jaxllm.ops.vocabulary import logits
from jaxllm.rollouts.source import ROLLOUT, TOLD, Rollouts
from jaxllm.rollouts.writer import Writer
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.stages import on_policy_run
from jaxllm.stages import ppo as ppo_stage
from jaxllm.stages.ppo import PpoConfig
from jaxllm.tokenizers.tokenizer import load_tokenizer
from jaxllm.training.learning_rates import layer_factors

PAIRS = r".*_lora_[a-z]+"


class Rollout(NamedTuple):
    """What a run has as it begins to learn from a rollout, on the host."""

    params: dict
    rows: dict
    told: dict
    asked: list
    written: list


class Watched(NamedTuple):
    rollouts: list
    trained: list
    """What is trained, before each update, with what the optimizer remembers of it."""


@pytest.fixture
def watched(monkeypatch):
    found, texts = Watched([], []), []
    write, prepare, batch = Writer.rollout, Rollouts.prepare, Rollouts.__call__

    def writing(self, *arguments):
        texts.append(write(self, *arguments))
        return texts[-1]

    def preparing(self, step, params, memory):
        before = len(texts)
        memory = prepare(self, step, params, memory)
        if len(texts) > before:
            kept = jax.device_get((params, memory[ROLLOUT], memory[TOLD]))
            found.rollouts.append(Rollout(*kept, *texts[-1]))
        return memory

    def asked_for(self, step, state):
        found.trained.append(jax.device_get((state.params, state.opt_state)))
        return batch(self, step, state)

    monkeypatch.setattr(Writer, "rollout", writing)
    monkeypatch.setattr(Rollouts, "prepare", preparing)
    monkeypatch.setattr(Rollouts, "__call__", asked_for)
    return found


@pytest.fixture(scope="module")
def prompts(json_lines):
    return json_lines([{"prompt": f"say {n}", "answer": "abcd"[n % 4]} for n in range(60)])


@pytest.fixture
def learn(command, finished_run, prompts):
    def run(stage, workdir, **fields):
        given = {"init": finished_run, "data__train": prompts, "optimizer__schedule": "constant"}
        given |= {"rl__group_size": 4} if stage == "grpo" else {}
        result = command(stage, workdir, **given | fields)
        assert result.code == 0, result.err
        return result

    return run


@pytest.fixture(scope="module")
def earlier_run(arguments, compiled, finished_run, tmp_path_factory):
    """Makes a run of another stage, which begins from `finished_run`."""
    folder = tmp_path_factory.mktemp("earlier")

    def make(stage, **fields):
        named = {path.replace("__", "."): value for path, value in fields.items()}
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        assert main(arguments(stage, folder / stage, {"init": finished_run, **named})) == 0
        for number, handler in before.items():
            signal.signal(number, handler)
        return folder / stage

    return make


@pytest.fixture(scope="module")
def reward_run(earlier_run, json_lines):
    pairs = [
        {"prompt": f"say {n}", "chosen": "abcd"[n % 4] * 3, "rejected": "mnop"[n % 4] * (n % 3 + 1)}
        for n in range(60)
    ]
    return earlier_run("reward", data__train=json_lines(pairs), data__seq_len=96)


def leaves(tree, pattern=".*"):
    """Arrays by path, those whose path matches."""
    return dict(trees.leaves_with_paths(trees.divide(tree, pattern)[0]))


def same(one, other):
    assert one.keys() == other.keys()
    return all((np.asarray(one[path]) == np.asarray(other[path])).all() for path in one)


def loaded(run):
    return load_model(run, make_mesh(MeshConfig()))


def log_probs(model, params, rows, temperature):
    """log π of each action, from the logits of all tokens at once, as float64; elsewhere 0."""
    of_rows = (jnp.asarray(rows[name]) for name in ("tokens", "positions", "segment_ids"))
    params = jax.tree.map(jnp.asarray, params)
    output = Transformer(model).apply({"params": params}, *of_rows)
    scores = np.asarray(logits(output.hidden, output_head(model, params)), np.float64) / temperature
    scores -= np.log(np.sum(np.exp(scores), axis=-1, keepdims=True))
    chosen = np.take_along_axis(scores, rows["targets"][..., None], axis=-1)[..., 0]
    return np.where(rows["loss_weights"] > 0, chosen, 0.0)


def test_ppo_has_the_defaults_of_the_reference():
    """Those of Ziegler et al. 2019 and Stiennon et al. 2020."""
    config = PpoConfig()
    assert (config.rl.kl_coef, config.rl.kl_target, config.rl.kl_horizon) == (0.05, 0, 10_000)
    assert (config.rl.epochs, config.temperature, config.optimizer.eps) == (4, 0.7, 1e-5)
    assert (config.rl.missing_end, config.rl.missing_end_penalty) == ("keep", 1)
    ppo = config.ppo
    assert (ppo.gamma, ppo.lam) == (1, 0.95)
    assert (ppo.whiten_advantages, ppo.whiten_rewards) == (True, False)
    assert (ppo.clip_low, ppo.clip_high, ppo.value_clip, ppo.value_coefficient) == (0.2,) * 3 + (
        0.1,
    )
    assert (ppo.entropy_bonus, ppo.kl_loss, ppo.max_kl, ppo.ratio) == (0, 0, 0, "token")
    assert (ppo.normalisation, config.value.shared, config.value.init) == ("token", False, "")


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_nothing_is_dropped(stage, learn, curve, tmp_path):
    """Of a model that drops activations where it is tuned."""
    for name, rate in (("with", 0.5), ("without", 0.0)):
        learn(stage, tmp_path / name, model__dropout=rate, steps=2, eval__every=2)
    for name in ("train/loss", "train/grad_norm", "rollout/reward", "rollout/logprob_gap"):
        assert curve(tmp_path / "with", name) == curve(tmp_path / "without", name)


def test_models_that_are_frozen_may_be_narrow(
    learn, watched, curve, reward_run, tmp_path, monkeypatch
):
    """The reference and the reward model in bfloat16 say nearly what they say in float32."""
    judges, load = [], on_policy_run.judge_of
    monkeypatch.setattr(
        on_policy_run, "judge_of", lambda *given: judges.append(load(*given)) or judges[-1]
    )
    monkeypatch.setattr(ppo_stage, "judge_of", on_policy_run.judge_of)
    given = {"reward__init": reward_run, "rewards": "", "steps": 1, "ppo__kl_loss": 0.1}
    for dtype in ("float32", "bfloat16"):
        narrow = {"reference__dtype": dtype, "reward__dtype": dtype}
        learn("ppo", tmp_path / dtype, **given, **narrow)
    for dtype, rollout, judge in zip(
        ("float32", "bfloat16"), watched.rollouts, judges, strict=True
    ):
        frozen = (rollout.params["reference"], judge.model.params)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(frozen)} == {dtype}
        trained = (rollout.params["policy"], rollout.params["value"])
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(trained)} == {"float32"}
    wide, narrow = (rollout.rows["reference_log_probs"] for rollout in watched.rollouts)
    assert 0 < np.abs(wide - narrow).max() < 0.05
    wide, narrow = (
        curve(tmp_path / dtype, "rollout/reward")[1] for dtype in ("float32", "bfloat16")
    )
    assert 0 < abs(wide - narrow) < 0.05


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_policy_and_reference_are_read_at_the_temperature_they_write_at(
    stage, learn, watched, curve, finished_run, tmp_path
):
    """And in parts of a rollout, each of which has its own rows back."""
    run, coefficient = tmp_path / "run", f"{stage}__kl_loss"  # so that the reference's are kept
    fields = {coefficient: 0.1, "rl__kl_coef": 0.1, "temperature": 0.7, "rl__epochs": 2}
    fields |= {"batch_size": 16, "micro_batch_size": 8, "steps": 4, "eval__every": 4}
    learn(stage, run, **fields)
    base = loaded(finished_run)
    assert len(watched.rollouts) == 2
    for place, rollout in enumerate(watched.rollouts):
        rows = rollout.rows
        policy = rollout.params["policy"] if stage == "ppo" else dict(rollout.params)
        policy.pop("reference", None)
        wanted = log_probs(base.model, policy, rows, 0.7)
        np.testing.assert_allclose(rows["old_log_probs"], wanted, atol=2e-5)
        np.testing.assert_allclose(rows["sampler_log_probs"], wanted, atol=2e-4)
        reference = log_probs(base.model, base.params, rows, 0.7)
        np.testing.assert_allclose(rows["reference_log_probs"], reference, atol=2e-5)
        kl = np.mean(np.sum(wanted - reference, axis=1))
        assert rollout.told[stage]["kl"] == pytest.approx(kl, abs=1e-4)
        assert (abs(kl) > 1e-2) == (place == 1)
        assert np.abs(log_probs(base.model, policy, rows, 1.0) - wanted).max() > 0.1
    ratios, kls = curve(run, "train/ratio"), curve(run, "train/approx_kl")
    for first in (1, 3):
        assert ratios[first] == pytest.approx(1, abs=1e-5)
        assert curve(run, "train/clip_fraction")[first] == 0
        assert abs(kls[first]) < 1e-6 < kls[first + 1]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["grpo", "ppo", "ppo_shared"])
def test_pairs_alone_are_trained_and_held_to_the_base_without_them(
    way, learn, command, watched, curve, finished_run, tmp_path
):
    run, stage = tmp_path / "run", way.split("_")[0]
    fields = {"lora__rank": 2, f"{stage}__kl_loss": 0.1, "rl__kl_coef": 0.1, "rl__epochs": 2}
    fields |= {"value__shared": True} if way == "ppo_shared" else {}
    learn(stage, run, **fields, steps=4, checkpoint__every=2)
    base = loaded(finished_run)
    of_base = leaves(base.params)
    begun, later = (rollout.params for rollout in watched.rollouts)
    assert "reference" not in begun
    if way == "ppo":
        begun, later = begun["policy"], later["policy"]
    for params in (begun, later):
        kept = leaves(trees.divide(params, f"{PAIRS}|head/.*")[1])
        assert same(kept, of_base)
    assert all((leaf == 0).all() for leaf in leaves(begun, ".*_lora_b").values())
    assert any((leaf != 0).any() for leaf in leaves(later, ".*_lora_b").values())
    trained = set(leaves(watched.trained[0][0]))
    own = {path for path in trained if not path.startswith(("value/", "head/"))}
    assert all(path.endswith(("_lora_a", "_lora_b")) for path in own)
    assert bool(trained - own) == (stage == "ppo")
    # The reference is the base, after updates too.
    rows = watched.rollouts[1].rows
    wanted = log_probs(base.model, base.params, rows, 0.7 if stage == "ppo" else 1.0)
    np.testing.assert_allclose(rows["reference_log_probs"], wanted, atol=2e-5)
    kl = curve(run, f"{stage}/kl")
    assert abs(kl[1]) < 1e-5 < 1e-3 < kl[3]
    # Checkpoints hold no base; with it, a later stage has the policy.
    saved = json.loads((run / "checkpoints" / "4" / "params" / "_METADATA").read_text())
    kept = {
        "/".join(key["key"] for key in leaf["key_metadata"])
        for leaf in saved["tree_metadata"].values()
    }
    assert {path for path in kept if not re.fullmatch(PAIRS, path)} == trained - own
    assert leaves(loaded(run).params, "(?!head/).*").keys() == of_base.keys()
    assert not same(leaves(loaded(run).params, "(?!head/).*"), of_base)
    assert command("generate", init=run, prompt="a").code == 0
    # Amid a rollout it goes on as it would have.
    halves = tmp_path / "halves"
    learn(stage, halves, **fields, steps=3, checkpoint__every=2)
    learn(stage, halves, **fields, steps=4, checkpoint__every=2)
    for name in ("train/loss", f"{stage}/kl"):
        assert curve(halves, name) == curve(run, name)
    assert same(leaves(loaded(halves).params), leaves(loaded(run).params))


def test_values_begin_as_what_the_reward_model_gives(learn, watched, curve, reward_run, tmp_path):
    run = tmp_path / "run"
    fields = {"reward__init": reward_run, "rewards": "", "max_new_tokens": 30}
    learn("ppo", run, **fields, steps=1, eval__every=1)
    (rollout,) = watched.rollouts
    mesh = make_mesh(MeshConfig())
    model = load_reward_model(reward_run, mesh)
    assert abs(model.mean) > 1e-3
    pairs = zip(rollout.asked, rollout.written, strict=True)
    with jax.set_mesh(mesh):
        wanted = model.of_ids([ResponseIds(asked.ids, written.ids) for asked, written in pairs])
    assert np.std(wanted) > 0.01
    ends = np.sum(rollout.rows["segment_ids"] > 0, axis=1) - 1
    ended = [response.ended for response in rollout.written]
    assert any(ended)
    for row, end in enumerate(ends):
        assert rollout.rows["value_weights"][row, end] == ended[row]
        if ended[row]:  # and what it is to become
            for name in ("old_values", "returns"):
                assert rollout.rows[name][row, end] == pytest.approx(wanted[row], abs=1e-5)
    # It is what they are worth, too: whatever is in rows is right at the last state but one.
    assert curve(run, "rollout/reward")[1] == pytest.approx(np.mean(wanted), abs=1e-5)
    # The value function is another model than the reward model, which stays as it is.
    summary = json.loads((run / "summary.json").read_text())
    again = load_reward_model(reward_run, mesh)
    assert same(leaves(again.params), leaves(model.params))
    assert "eval/rewards/reward_model" in summary


def test_values_begin_at_nothing_without_a_reward_model(learn, watched, tmp_path):
    learn("ppo", tmp_path / "run", steps=1)
    (rollout,) = watched.rollouts
    assert not rollout.rows["old_values"].any()
    assert rollout.rows["returns"].any()


def test_updates_of_a_rollout_end_where_it_has_gone_too_far(learn, watched, curve, tmp_path):
    most, run = 1e-4, tmp_path / "run"
    learn("ppo", run, steps=8, rl__epochs=4, ppo__max_kl=most, eval__every=8, checkpoint__every=8)
    found = curve(run, "train/approx_kl")
    # The first finds the policy where it was, the second too far away; and there it ends.
    assert found[1] <= most < found[2]
    moved = [
        not all(
            (np.asarray(a) == np.asarray(b)).all()
            for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        )
        for before, after in zip(watched.trained, watched.trained[1:], strict=False)
    ]
    assert moved == [True, True, False, False, True, True, False]
    for step in (3, 4, 7, 8):
        assert found[step] == 0
        assert curve(run, "train/grad_norm")[step] == 0
    assert curve(run, "train/skipped")[8] == 0


def test_each_model_has_its_own_learning_rate(learn, watched, tmp_path):
    fields = {"optimizer__learning_rates": "value/.*:0", "optimizer__weight_decay": 0.0}
    learn("ppo", tmp_path / "run", **fields, steps=3, rl__epochs=1)
    first, last = watched.trained[0][0], watched.trained[-1][0]
    assert same(leaves(first["value"]), leaves(last["value"]))
    assert not same(leaves(first["policy"]), leaves(last["policy"]))


def test_a_model_of_two_heads_learns_to_foretell(learn, watched, curve, tmp_path):
    run = tmp_path / "run"
    fields = {"value__shared": True, "ppo__value_clip": 0.0, "ppo__value_coefficient": 1.0}
    learn("ppo", run, **fields, rl__kl_coef=0.0, rewards="regex('.')", steps=12, eval__every=12)
    first, *_, last = watched.rollouts
    assert set(first.params) == set(last.params) >= {"head", "embedding"}
    assert not np.asarray(first.params["head"]["kernel"]).any()
    assert np.asarray(last.params["head"]["kernel"]).any()
    apart = [
        np.mean(np.abs(rows["old_values"] - rows["returns"])[rows["value_weights"] > 0])
        for rows in (first.rows, last.rows)
    ]
    assert apart[1] < 0.5 * apart[0]


def test_a_coefficient_follows_the_divergence(learn, curve, tmp_path):
    target, horizon, run = 0.02, 100.0, tmp_path / "run"
    fields = {"rl__kl_target": target, "rl__kl_horizon": horizon, "rl__epochs": 2}
    learn("ppo", run, **fields, steps=12, eval__every=12, checkpoint__every=12)
    kl, coefficients = (list(curve(run, f"ppo/{name}").values()) for name in ("kl", "kl_coef"))
    assert kl[::2] == kl[1::2]  # of a rollout, told with each of its updates
    kl, coefficients = kl[::2], coefficients[::2]
    assert coefficients[0] == pytest.approx(0.05)
    for before, after, found in zip(coefficients, coefficients[1:], kl, strict=False):
        error = np.clip(found / target - 1, -0.2, 0.2)
        assert after == pytest.approx(before * (1 + error * 16 / horizon), rel=1e-5)
    assert coefficients[1] < coefficients[0]  # policy and reference are the same at first
    assert max(kl) > target
    assert coefficients[-1] > min(coefficients)


def test_each_of_two_models_has_the_rates_of_its_own_layers(tiny_model):
    policy, value = (param_shapes(tiny_model(layers=count)) for count in (3, 2))
    found = layer_factors(0.5, {"policy": policy, "value": value})
    wanted = {f"policy/{path}": factor for path, factor in layer_factors(0.5, policy).items()}
    wanted |= {f"value/{path}": factor for path, factor in layer_factors(0.5, value).items()}
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[path], wanted[path]) for path in wanted)
    assert found["policy/embedding"] == 0.5**4
    assert found["value/embedding"] == 0.5**3


@pytest.mark.slow
def test_what_a_calculator_writes_is_not_learnt(
    learn, earlier_run, json_lines, watched, curve, tmp_path
):
    asked = [{"prompt": f"say {n}", "response": "<<3*4=12>>"} for n in range(60)]
    # It learns to ask for a result.
    tuned = earlier_run(
        "sft", data__train=json_lines(asked), steps=300, eval__every=300, checkpoint__every=300
    )
    given = {"init": tuned, "rl__calculator": True, "max_new_tokens": 12, "temperature": 1.0}
    learn("ppo", tmp_path / "run", **given, rewards="regex('12>>')", steps=2, eval__every=2)
    tokenizer = load_tokenizer(tuned / "tokenizer")
    asking = 0
    for rollout in watched.rollouts:
        for row, (prompt, response) in enumerate(zip(rollout.asked, rollout.written, strict=True)):
            begin = len(prompt.ids) - 1
            places = slice(begin, begin + len(response.ids))
            chosen = np.array(response.chosen)
            inserted = tokenizer.decode(np.array(response.ids)[~chosen].tolist())
            asking += inserted == "12>>" and "<<3*4=12>>" in response.text
            for name in ("loss_weights", "value_weights"):
                assert (rollout.rows[name][row, places] == chosen).all()
            for name in ("sampler_log_probs", "old_log_probs", "old_values", "advantages"):
                assert not rollout.rows[name][row, places][~chosen].any()
            end = begin + len(response.ids)
            assert rollout.rows["value_weights"][row, end] == response.ended
        assert (rollout.rows["targets"][rollout.rows["loss_weights"] > 0] > 0).all()
    assert asking > 12
    # What the policy writes behind a result it writes having read it, as the learner reads it.
    assert max(curve(tmp_path / "run", "rollout/logprob_gap").values()) < 1e-4
    assert curve(tmp_path / "run", "train/grad_norm")[1] > 0


@pytest.mark.slow
def test_a_policy_is_what_later_stages_begin_from(
    learn, command, watched, json_lines, finished_run, curve, tmp_path
):
    learn("ppo", tmp_path / "ppo", steps=4)
    policy = leaves(loaded(tmp_path / "ppo").params)
    assert not same(policy, leaves(loaded(finished_run).params))
    watched.rollouts.clear()
    learn("grpo", tmp_path / "grpo", init=tmp_path / "ppo", rl__kl_coef=0.1, steps=1)
    params = dict(watched.rollouts[0].params)
    assert same(leaves(params.pop("reference")), policy)
    assert same(leaves(params), policy)
    assert abs(curve(tmp_path / "grpo", "grpo/kl")[1]) < 1e-6
    # And held to another model than it begins from.
    fields = {"init": tmp_path / "ppo", "reference__init": finished_run, "steps": 1}
    learn("ppo", tmp_path / "held", **fields)
    # Of a few responses it may be below 0.
    assert abs(curve(tmp_path / "held", "ppo/kl")[1]) > 1e-3
    pairs = [{"prompt": f"say {n}", "chosen": "b" * 3, "rejected": "a" * 3} for n in range(40)]
    given = {"init": tmp_path / "ppo", "data__train": json_lines(pairs), "data__seq_len": 48}
    for stage in ("reward", "dpo"):
        result = command(stage, tmp_path / stage, **given, steps=1)
        assert result.code == 0, result.err
    assert curve(tmp_path / "dpo", "train/loss")[1] == pytest.approx(np.log(2), abs=1e-5)
