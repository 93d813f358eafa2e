"""Batches: a function of (rows, seed, step), however many devices share them."""

import threading

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.data.batches import BatchSource, EvalBatches
from jaxllm.data.rows import PackedRows
from jaxllm.data.shuffle import ShuffledEpochs
from jaxllm.data.store import ShardCounts, TokenStore
from jaxllm.errors import UserError


class NumberedRows:
    """Row `i` holds `i` and is a function of `i` alone."""

    seq_len = 4

    def __init__(self, count):
        self.count = count
        self.read = []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        tokens = np.full(4, index, np.int32) * 10 + np.arange(4, dtype=np.int32)
        return {"tokens": tokens, "loss_weights": np.ones(4, np.float32)}


def sharding(devices=1, spec=("data",), axes=("data",), shape=None):
    mesh = jax.make_mesh(
        shape or (devices,),
        axes,
        axis_types=(AxisType.Auto,) * len(axes),
        devices=jax.devices()[:devices],
    )
    return NamedSharding(mesh, P(*spec))


@pytest.fixture
def batches():
    """Makes batch sources, and closes them."""
    sources = []

    def make(rows, batch_size, where=None, prefetch=2, seed=0):
        endless = ShuffledEpochs(rows, seed) if isinstance(rows, NumberedRows) else rows
        sources.append(BatchSource(endless, batch_size, where or sharding(), prefetch))
        return sources[-1]

    yield make
    for source in sources:
        source.close()


def numbers(batch):
    return (np.asarray(batch["tokens"])[:, 0] // 10).tolist()


def test_a_corpus_smaller_than_a_batch_repeats(batches):
    assert numbers(batches(NumberedRows(1), 4)(0)) == [0, 0, 0, 0]
    assert sorted(numbers(batches(NumberedRows(3), 6)(5))) == [0, 0, 1, 1, 2, 2]


def test_batches_are_consecutive_rows_in_any_order_of_asking(batches):
    dataset = ShuffledEpochs(NumberedRows(20), 0)
    expected = [
        [int(dataset[8 * step + row]["tokens"][0]) // 10 for row in range(8)] for step in range(12)
    ]
    source = batches(NumberedRows(20), 8)
    for step in [0, 1, 2, 7, 3, 3, 11, 0, 1, 2]:
        assert numbers(source(step)) == expected[step]


LAYOUTS = [
    {"devices": 1},
    {"devices": 2},
    {"devices": 8},
    {"devices": 8, "shape": (4, 2), "axes": ("data", "tensor")},
    {"devices": 8, "shape": (2, 4), "axes": ("data", "fsdp"), "spec": (("data", "fsdp"),)},
    {"devices": 8, "shape": (2, 4), "axes": ("data", "seq"), "spec": ("data", "seq")},
    {"devices": 4, "spec": ()},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_do_not_depend_on_the_devices(batches, layout):
    if layout["devices"] > jax.device_count():
        pytest.skip("needs simulated devices")
    rows = NumberedRows(20)
    where = sharding(**layout)
    with jax.transfer_guard("disallow"):
        got = batches(rows, 8, where, prefetch=0)(3)
    expected = batches(NumberedRows(20), 8)(3)
    assert got["tokens"].sharding.is_equivalent_to(where, 2)
    for name in expected:
        np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(expected[name]))
    assert len(rows.read) == 8  # each row once, however many devices hold it


def test_the_next_batches_are_made_ahead(batches):
    rows = NumberedRows(1000)
    made = threading.Event()

    class Watched:
        def __len__(self):
            return 10**9

        def __getitem__(self, index):
            if index == 3 * 2 + 1:
                made.set()
            return rows[index % 1000]

    batches(Watched(), 2, prefetch=3)(0)
    assert made.wait(10)


def test_an_error_in_the_thread_reaches_the_step_that_it_concerns(batches):
    class Broken:
        def __len__(self):
            return 10**9

        def __getitem__(self, index):
            if index == 5:
                raise OSError("disk gone")
            return NumberedRows(100)[index]

    source = batches(Broken(), 2)
    assert numbers(source(1)) == [2, 3]
    for _ in range(2):
        with pytest.raises(OSError, match="disk gone"):
            source(2)
    assert numbers(source(3)) == [6, 7]


def test_a_batch_that_the_devices_cannot_divide_is_told(packed):
    if jax.device_count() < 4:
        pytest.skip("needs simulated devices")
    with pytest.raises(UserError, match=r"config\.batch_size: 6 rows cannot be divided"):
        BatchSource(ShuffledEpochs(NumberedRows(9), 0), 6, sharding(4))
    with pytest.raises(UserError, match=r"config\.batch_size: 6"):
        EvalBatches(packed, 6, sharding(4))


@pytest.fixture
def packed(tmp_path):
    """Five rows of a store of one document."""
    np.save(tmp_path / "tokens_00000.npy", np.arange(1, 20, dtype=np.uint16))
    np.save(tmp_path / "offsets_00000.npy", np.array([0, 19]))
    store = TokenStore(tmp_path, "", 60_000, "uint16", (ShardCounts(19, 1, 0),))
    return PackedRows(store, 4)


def test_evaluation_goes_once_over_the_rows_and_fills_up_with_nothing(packed):
    batches = EvalBatches(packed, 2, sharding())
    assert len(batches) == 3
    for _ in range(2):  # a second evaluation sees the same
        got = list(batches)
        assert len(got) == 3
        tokens = np.concatenate([batch["tokens"] for batch in got])
        assert tokens.ravel()[:18].tolist() == list(range(1, 19))
        weights = np.concatenate([batch["loss_weights"] for batch in got])
        assert weights.sum() == 18
        assert not any(np.asarray(array)[1].any() for array in got[-1].values())
    assert len(EvalBatches(packed, 2, sharding(), max_batches=2)) == 2
    assert len(list(EvalBatches(packed, 2, sharding(), max_batches=9))) == 3


def test_some_evaluation_batches_are_spread_over_the_text(packed):
    (batch,) = EvalBatches(packed, 2, sharding(), max_batches=1)
    third = np.asarray(packed[3]["tokens"])
    np.testing.assert_array_equal(batch["tokens"], [packed[0]["tokens"], third])
