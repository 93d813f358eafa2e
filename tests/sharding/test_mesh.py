"""Meshes: their shape, and what does not fit."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import from_dict
from jaxllm.errors import UserError
from jaxllm.sharding.mesh import (
    BATCH_AXES,
    MeshConfig,
    batch_sharding,
    batch_shards,
    constrain,
    make_mesh,
    tpu_grid,
)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(fsdp=2, tensor=2), (2, 2, 1, 2)),
        (MeshConfig(data=1, fsdp=-1), (1, 8, 1, 1)),
        (MeshConfig(data=2, fsdp=1, tensor=-1), (2, 1, 1, 4)),
        (MeshConfig(expert=4), (2, 1, 4, 1)),
    ],
)
def test_the_axis_of_minus_1_takes_what_is_left(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == ("data", "fsdp", "expert", "tensor")
    assert mesh.devices.shape == shape
    assert batch_shards(mesh) == shape[0] * shape[1] * shape[2]


@pytest.mark.parametrize(
    "config", [MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(data=1), MeshConfig(tensor=16)]
)
def test_a_product_that_is_not_the_devices_is_refused(config):
    with pytest.raises(UserError, match=r"config\.mesh: .* does not fit 8 device"):
        make_mesh(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor": 0}, r"config\.mesh\.tensor: must be positive"),
        ({"fsdp": -2}, r"config\.mesh\.fsdp: must be positive"),
        ({"fsdp": -1}, r"config\.mesh\.data: only one axis of the mesh may be -1"),
    ],
)
def test_a_wrong_field_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        from_dict(MeshConfig, changes, "mesh")


def test_rows_lie_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    array = jax.device_put(np.arange(16).reshape(8, 2), batch_sharding(mesh))
    pieces = {(s.index[0].start, s.data.shape) for s in array.addressable_shards}
    assert pieces == {(begin, (2, 2)) for begin in (0, 2, 4, 6)}


def test_constrain_lays_an_activation_out_over_the_mesh_in_use():
    x = jnp.zeros((8, 4))
    assert constrain(x, BATCH_AXES) is x  # no mesh, nothing to do
    with jax.set_mesh(make_mesh(MeshConfig(data=4, tensor=2))):
        laid_out = jax.jit(lambda x: constrain(x, BATCH_AXES, "tensor"))(x)
    assert laid_out.sharding.shard_shape(x.shape) == (2, 2)


def _chips(slices):
    """Sixteen TPU devices, as far as the building of a mesh reads them."""
    each = 16 // slices

    def chip(number):
        device = mock.Mock(spec=jax.Device, id=number, process_index=number // 4, core_on_chip=0)
        device.platform, device.device_kind = "tpu", "TPU v5 lite"
        device.slice_index, within = divmod(number, each)
        device.coords = (within % 4, within // 4, 0)
        return device

    return [chip(number) for number in range(16)]


@pytest.mark.parametrize(
    ("slices", "config", "crossing"),
    [
        (2, MeshConfig(data=2, fsdp=8), "data"),
        (2, MeshConfig(data=4, fsdp=2, tensor=2), "data"),
        (2, MeshConfig(data=1, fsdp=16), "fsdp"),
        (4, MeshConfig(data=2, fsdp=8), "both"),
    ],
)
def test_slices_lie_along_data_and_then_fsdp(slices, config, crossing):
    shape = dataclasses.astuple(config)
    grid = np.vectorize(lambda device: device.slice_index)(tpu_grid(shape, _chips(slices)))
    assert grid.shape == (config.data, config.fsdp, 1, config.tensor)
    assert len(np.unique(grid)) == slices
    along_data = np.any(grid != grid[:1])
    along_fsdp = np.any(grid != grid[:, :1])
    assert (along_data, along_fsdp) == {
        "data": (True, False),
        "fsdp": (False, True),
        "both": (True, True),
    }[crossing]
    assert not np.any(grid != grid[..., :1]), "tensor parallelism stays within a slice"


def test_a_single_slice_is_laid_along_its_torus():
    grid = tpu_grid((4, 4, 1, 1), _chips(1))
    assert grid.shape == (4, 4, 1, 1)
    assert sorted(device.id for device in grid.flat) == list(range(16))


def test_slices_that_data_and_fsdp_cannot_be_divided_over_are_refused():
    with pytest.raises(UserError, match="data 1 and fsdp 2 cannot be divided over 4 slices"):
        tpu_grid((1, 2, 1, 8), _chips(4))
