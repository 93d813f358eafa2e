"""GRPO and PPO over meshes of devices: what one device writes and learns, cut into shares."""

import json

import jax
import numpy as np
import pytest

from jaxllm import trees
from jaxllm.inference import engine
from jaxllm.rollouts.source import ROLLOUT, Rollouts
from jaxllm.rollouts.writer import Writer
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.stages import training_run

WAYS = {
    "grpo": {"rl__group_size": 4, "rl__kl_coef": 0.1, "grpo__kl_loss": 0.1},
    "ppo": {"rl__kl_target": 3.0},
}
FIELDS = {
    "steps": 4,
    "eval__every": 4,
    "checkpoint__every": 4,
    "micro_batch_size": 8,
    "rl__minibatches": 2,
    "rl__epochs": 1,
    # With a smaller one, Adam makes a whole step of the rounding of a gradient near zero.
    "optimizer__eps": 1e-5,
}
MESHES = {
    "data": {"mesh__data": 8},
    "cut": {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2},
}


class Watched:
    """What the runs of a test show of their inside."""

    def __init__(self):
        self.responses = []
        """The ids of each rollout."""
        self.params = []
        """All parameters, at each update,"""
        self.written_by = []
        """those that an engine writes with,"""
        self.caches = []
        """its keys and values,"""
        self.kept = []
        """and the arrays of a rollout."""


@pytest.fixture
def watched(monkeypatch):
    found = Watched()
    write, prepare, decode = Writer.rollout, Rollouts.prepare, engine.decode

    def writing(self, *arguments):
        asked, written = write(self, *arguments)
        found.responses.append([response.ids for response in written])
        return asked, written

    def preparing(self, step, params, memory):
        memory = prepare(self, step, params, memory)
        found.params.append(shares(params))
        found.kept.append(shares(memory[ROLLOUT]))
        return memory

    def decoding(params, slots, cache, *arguments, **options):
        found.written_by.append(shares(params))
        slots, cache, written = decode(params, slots, cache, *arguments, **options)
        found.caches += [shares(layer._asdict()) for stack in cache for layer in stack]
        return slots, cache, written

    monkeypatch.setattr(Writer, "rollout", writing)
    monkeypatch.setattr(Rollouts, "prepare", preparing)
    monkeypatch.setattr(engine, "decode", decoding)
    return found


def shares(tree):
    """Into how many different parts each array is cut, and along which axes of the mesh, by
    path."""
    found = {}
    for path, leaf in trees.leaves_with_paths(tree):
        mesh, part = leaf.sharding.mesh, leaf.sharding.shard_shape(leaf.shape)
        assert len(leaf.sharding.device_set) == mesh.size, path
        axes = {name for axis in leaf.sharding.spec if axis for name in np.atleast_1d(axis)}
        found[path] = leaf.size // int(np.prod(part)), {a for a in axes if mesh.shape[a] > 1}
    return found


@pytest.fixture
def learn(command, finished_run, json_lines, monkeypatch, tmp_path):
    """Runs a way over a mesh; a mesh of None is one device."""
    prompts = json_lines([{"prompt": f"say {n}"} for n in range(60)])

    def run(way, name, mesh):
        given = {"init": finished_run, "data__train": prompts, **FIELDS, **WAYS[way]}
        with monkeypatch.context() as patch:
            if mesh is None:
                alone = make_mesh(MeshConfig(), jax.devices()[:1])
                patch.setattr(training_run, "make_mesh", lambda config: alone)
            result = command(way, tmp_path / name, **given, **(mesh or {}))
        assert result.code == 0, result.err
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return {line["step"]: line for line in map(json.loads, lines) if "train/loss" in line}

    return run


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_mesh_writes_and_learns_what_one_device_does(way, learn, watched, curve, tmp_path):
    expected = learn(way, "alone", None)
    alone = watched.responses[:]
    assert len(alone) == 2
    assert alone[0] != alone[1]
    assert max(len(set(map(tuple, rollout))) for rollout in alone) > 16  # there is much to draw
    names = ("train/loss", "train/grad_norm", "rollout/reward", "rollout/logprob_gap", f"{way}/kl")
    for name, mesh in MESHES.items():
        watched.__init__()
        found = learn(way, name, mesh)
        assert watched.responses == alone
        assert list(found) == list(expected) == [1, 2, 3, 4]
        for step, line in expected.items():
            for each in names:
                assert found[step][each] == pytest.approx(line[each], rel=5e-4, abs=2e-5), each
            assert found[step]["rollout/reward"] == line["rollout/reward"]
        rewards = [curve(tmp_path / each, "eval/reward") for each in ("alone", name)]
        assert rewards[0] == rewards[1]
        check_layout(way, name, watched)


def check_layout(way, name, watched):
    """Rows are cut into shares everywhere; matrices, and heads of keys and values, where there is
    an axis for them."""
    cut = name == "cut"
    trained = ("policy", "value") if way == "ppo" else ("stack_0",)
    assert len(watched.params) == 4
    for params in watched.params:
        assert {path.split("/")[0] for path in params} >= {*trained, "reference"}
        for path, (parts, axes) in params.items():
            if path.endswith(("kernel", "embedding", "output")) and "head" not in path:
                assert (parts, axes) == ((4, {"fsdp", "tensor"}) if cut else (1, set())), path
        if way == "ppo":
            assert params["value/head/kernel"] == ((2, {"fsdp"}) if cut else (1, set()))
    assert watched.written_by
    for params in watched.written_by:
        for path, (parts, _) in params.items():
            if path.endswith(("kernel", "embedding", "output")):
                assert parts == (4 if cut else 1), path
    assert watched.caches
    rows = {"data", "fsdp"} if cut else {"data"}
    for layer in watched.caches:
        for path, (parts, axes) in layer.items():
            assert parts == 8, path
            assert axes == (rows | {"tensor"} if cut else rows), path
    for arrays in watched.kept:
        for path, (parts, axes) in arrays.items():
            assert parts == (4 if cut else 8), path
            assert rows <= axes, path
