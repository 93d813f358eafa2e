"""Shuffled epochs: every row once an epoch, in an order that is a function of (seed, epoch)."""

from jaxllm.data.shuffle import ShuffledEpochs

KNOWN_ORDER = [5, 2, 1, 0, 4, 6, 3, 7]


def order(rows, seed, epoch, stream=0):
    dataset = ShuffledEpochs(rows, seed, stream)
    size = len(rows)
    return [int(dataset[k]["row"][1]) for k in range(epoch * size, (epoch + 1) * size)]


def test_every_epoch_holds_each_row_once_in_an_order_of_its_own(numbered_rows):
    epochs = [order(numbered_rows(50), 3, epoch) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert list(range(50)) not in epochs


def test_neighbouring_seeds_and_streams_share_no_order(numbered_rows):
    orders = {
        tuple(order(numbered_rows(50), seed, epoch, stream))
        for seed in range(4)
        for epoch in range(4)
        for stream in range(3)
    }
    assert len(orders) == 48


def test_an_element_depends_on_its_number_alone(numbered_rows):
    one, other = (ShuffledEpochs(numbered_rows(7), seed=1) for _ in range(2))
    forward = [one[k]["row"].tolist() for k in range(40)]
    backward = [other[k]["row"].tolist() for k in reversed(range(40))]
    assert forward == backward[::-1]
    distant = one[10**15]["row"].tolist()
    assert ShuffledEpochs(numbered_rows(7), seed=1)[10**15]["row"].tolist() == distant


def test_a_known_order_so_that_a_run_resumes_on_a_later_version(numbered_rows):
    assert order(numbered_rows(8), 0, 0) == KNOWN_ORDER
