"""Copies of parameters on several devices: equal ones pass, and one differing bit is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.errors import Preempted
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.training import replicas
from jaxllm.training.replicas import ReplicasDiffer, check_replicas

SPECS = {
    "replicated": PartitionSpec(),
    "split": PartitionSpec("fsdp"),
    "split both ways": PartitionSpec("fsdp", "tensor"),
    "split over two axes": PartitionSpec(None, ("fsdp", "tensor")),
    "one part each": PartitionSpec(("data", "fsdp"), "tensor"),
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def placed(mesh, spec, values, broken=()):
    """`values` on the mesh; copies on the devices numbered in `broken` have one bit turned over."""
    sharding = NamedSharding(mesh, spec)
    shards = []
    for device, index in sharding.devices_indices_map(values.shape).items():
        shard = np.array(values[index])
        if device.id in broken:
            shard.view(np.uint8).reshape(-1)[-1] ^= 1
        shards.append(jax.device_put(shard, device))
    return jax.make_array_from_single_device_arrays(values.shape, sharding, shards)


def values(dtype=np.float32, shape=(8, 8), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def tree(mesh, broken_at="", broken=()):
    return {
        "layer": {
            name: placed(mesh, spec, values(), broken if name == broken_at else ())
            for name, spec in SPECS.items()
        },
        "scale": placed(mesh, PartitionSpec(), values(shape=())),
        "half": placed(mesh, PartitionSpec(), values(jnp.bfloat16)),
        "count": placed(mesh, PartitionSpec("fsdp"), np.arange(4, dtype=np.int32)),
        "on": placed(mesh, PartitionSpec(), np.array([True, False])),
        "here": jnp.ones(3),
    }


def test_equal_copies_pass(mesh):
    check_replicas(tree(mesh))
    check_replicas({})
    check_replicas({"alone": jnp.ones(3)})


@pytest.mark.parametrize("name", ["replicated", "split", "split both ways", "split over two axes"])
@pytest.mark.parametrize("device", [0, 5, 7])
def test_one_bit_of_one_copy_is_told_with_its_device(mesh, name, device):
    with pytest.raises(ReplicasDiffer) as raised:
        check_replicas(tree(mesh, name, {device}))
    message = str(raised.value)
    assert f"layer/{name} on device " in message
    assert f"{device} (process 0)" in message
    assert "; and" not in message and "scale" not in message
    held = NamedSharding(mesh, SPECS[name]).devices_indices_map((8, 8))
    of_the_part = {d.id for d in held if held[d] == held[jax.devices()[device]]}
    told = {d for d in range(8) if f"{d} (process 0)" in message}
    assert told == of_the_part


def test_the_one_that_stands_alone_is_named_last(mesh):
    with pytest.raises(ReplicasDiffer, match=r"against device 3 \(process 0\)\. Run"):
        check_replicas(tree(mesh, "replicated", {3}))


def test_parts_of_which_there_is_one_copy_are_not_compared(mesh):
    check_replicas(tree(mesh, "one part each", {3}))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.int8, np.uint16])
def test_every_dtype_is_read_bit_by_bit(mesh, dtype):
    check_replicas({"w": placed(mesh, PartitionSpec(), values(dtype))})
    with pytest.raises(ReplicasDiffer):
        check_replicas({"w": placed(mesh, PartitionSpec(), values(dtype), {6})})


def test_it_ends_every_process_to_be_run_again(mesh):
    with pytest.raises(Preempted) as raised:
        check_replicas({"w": placed(mesh, PartitionSpec(), values(), {6})})
    assert raised.value.exit_code == 75
    assert raised.value.together


def test_many_differences_are_counted(mesh):
    params = {f"w{i}": placed(mesh, PartitionSpec(), values(seed=i), {1}) for i in range(5)}
    with pytest.raises(ReplicasDiffer, match=r"w0 .*; w1 .*; w2 .*; and 2 more parameters"):
        check_replicas(params)


def test_zeros_of_both_signs_differ_and_equal_nans_do_not(mesh):
    zeros = values() * 0.0
    devices = jax.devices()
    shards = [jax.device_put(-zeros if d == devices[2] else abs(zeros), d) for d in devices]
    sharding = NamedSharding(mesh, PartitionSpec())
    array = jax.make_array_from_single_device_arrays(zeros.shape, sharding, shards)
    with pytest.raises(ReplicasDiffer):
        check_replicas({"w": array})
    check_replicas({"w": placed(mesh, PartitionSpec(), np.full((2, 2), np.nan, np.float32))})


def test_the_program_is_made_once_for_parameters_laid_out_alike(mesh):
    replicas._program.cache_clear()
    for _ in range(3):
        check_replicas(tree(mesh))
    info = replicas._program.cache_info()
    assert (info.misses, info.hits) == (1, 2)
