"""Goodput: every moment counted once, over all lives of a run, whatever ends them."""

import errno
import json
import math
import time

import pytest

from jaxllm.reporting import goodput
from jaxllm.reporting.goodput import (
    CATEGORIES,
    Ledger,
    Life,
    goodput_scalars,
    lost_steps,
    read_lives,
    seconds_by_category,
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ledger(clock):
    return Ledger(clock(), clock)


def life(first=None, last=None, began=0.0, finished=False, **seconds):
    all_seconds = dict.fromkeys(CATEGORIES, 0.0) | {k: float(v) for k, v in seconds.items()}
    return Life(began, all_seconds, first, last, finished)


def spent(ledger):
    prefix = "goodput/seconds/"
    found = {name.removeprefix(prefix): s for name, s in ledger.finish().items() if prefix in name}
    return {name: seconds for name, seconds in found.items() if seconds}


def test_inner_time_is_not_counted_in_the_outer(ledger, clock):
    clock.pass_(1)
    with ledger.spending("evaluation"):
        clock.pass_(2)
        with ledger.spending("checkpoint"):
            clock.pass_(4)
        clock.pass_(8)
        with ledger.spending("evaluation"):
            clock.pass_(16)
    clock.pass_(32)
    assert spent(ledger) == {"start": 33, "evaluation": 26, "checkpoint": 4}


def test_a_block_that_an_error_leaves_is_closed(ledger, clock):
    with pytest.raises(KeyError), ledger.spending("evaluation"), ledger.spending("data"):
        clock.pass_(1)
        raise KeyError
    clock.pass_(2)
    assert ledger.category == "start"
    assert spent(ledger) == {"data": 1, "start": 2}


def test_what_is_in_no_block_is_start_then_compilation_then_steps(ledger, clock):
    clock.pass_(1)
    ledger.resumed(5)
    assert ledger.category == "compile"
    clock.pass_(2)
    with ledger.spending("data_wait"):
        clock.pass_(4)
    clock.pass_(8)
    ledger.finished(6)
    clock.pass_(16)
    ledger.finished(7)
    clock.pass_(32)
    ledger.otherwise("evaluation")
    clock.pass_(64)
    assert spent(ledger) == {
        "start": 1,
        "compile": 10,
        "data_wait": 4,
        "step": 48,
        "evaluation": 64,
    }


def test_the_default_can_change_inside_a_block(ledger, clock):
    with ledger.spending("data"):
        clock.pass_(1)
        ledger.otherwise("compile")
        clock.pass_(2)
    clock.pass_(4)
    assert spent(ledger) == {"data": 3, "compile": 4}


def test_categories_add_up_to_the_wall_time_since_the_given_moment():
    begin = time.monotonic() - 3.0
    ledger = Ledger(begin)
    ledger.resumed(0)
    for step in range(1, 50):
        with ledger.spending("data_wait"), ledger.spending("checkpoint"):
            pass
        ledger.finished(step)
    before = time.monotonic() - begin
    total = math.fsum(spent(ledger).values())
    assert before - 1e-6 <= total <= time.monotonic() - begin + 1e-6


def test_nothing_is_lost_when_every_life_goes_on_from_the_last_step_of_the_one_before():
    assert lost_steps([life(0, 10), life(10, 20), life(20, 30)]) == [0, 0, 0]


@pytest.mark.parametrize(
    ("spans", "lost"),
    [
        ([(0, 10), (6, 9)], [4, 0]),
        ([(0, 10), (6, 9), (8, 12)], [4, 1, 0]),
        # A fallback to an older checkpoint takes more from every life before it, once.
        ([(0, 10), (6, 9), (4, 12)], [6, 3, 0]),
        ([(0, 10), (6, 9), (4, 12), (6, 7)], [6, 3, 6, 0]),
        ([(0, 10), (6, 14), (0, 3)], [10, 8, 0]),
        # Lives that made no step, or did not come to the restored step, change nothing.
        ([(0, 10), (6, 6), (6, 12)], [4, 0, 0]),
        ([(0, 10), (None, None), (8, 12)], [2, 0, 0]),
        # Steps of which the first life told nothing, because its last write failed.
        ([(0, 3), (6, 12)], [0, 0]),
    ],
)
def test_a_step_is_lost_when_a_later_life_makes_it_again(spans, lost):
    assert lost_steps([life(*span) for span in spans]) == lost


def test_lost_steps_take_their_share_of_the_seconds_of_steps():
    # Ten steps: the first compiles, nine take 9 s, and four are made again.
    seconds = seconds_by_category([life(0, 10, compile=5, step=9), life(6, 10, step=3)])
    assert seconds["lost"] == pytest.approx(4)
    assert seconds["step"] == pytest.approx(5 + 3)
    assert seconds["compile"] == 5


def test_all_seconds_are_lost_with_all_steps():
    seconds = seconds_by_category([life(0, 3, step=6), life(0, 3, step=7)])
    assert (seconds["lost"], seconds["step"]) == (6, 7)


def test_time_between_lives_is_down_but_not_after_the_end():
    lives = [
        life(began=100.0, start=10),
        life(began=115.0, start=20, finished=True),
        life(began=500.0, start=30),
        life(began=520.0, start=1),  # by a clock that is behind
    ]
    assert seconds_by_category(lives)["down"] == 5
    assert sum(seconds_by_category(lives).values()) == 66


def test_useful_is_the_share_of_all_wall_time():
    lives = [life(0, 11, began=0.0, start=10, step=10), life(6, 12, began=30.0, step=60)]
    scalars = goodput_scalars(lives)
    assert scalars["goodput/lives"] == 2
    assert scalars["goodput/seconds/lost"] == 5
    assert scalars["goodput/seconds/down"] == 10
    assert scalars["goodput/useful_share"] == pytest.approx(65 / 90)
    assert goodput_scalars([])["goodput/useful_share"] == 0


def test_lives_are_kept_in_the_file_one_behind_the_other(tmp_path, clock):
    path = tmp_path / "goodput.json"
    for restored in (0, 2):
        ledger = Ledger(clock(), clock)
        clock.pass_(1)
        ledger.keep(path)
        ledger.resumed(restored)
        clock.pass_(2)
        ledger.finished(restored + 1)
        clock.pass_(3)
        ledger.finished(restored + 2)
        ledger.write()
    scalars = ledger.finish()
    first, second = read_lives(path)
    assert (first.first_step, first.last_step, first.finished) == (0, 2, False)
    assert (second.first_step, second.last_step, second.finished) == (2, 4, True)
    assert first.seconds == second.seconds
    assert first.seconds["start"] == 1 and first.seconds["step"] == 3
    assert scalars["goodput/seconds/step"] == 6
    assert ledger.log_scalars() == {
        name: scalars[name] for name in ("goodput/useful_share", "goodput/seconds/lost")
    }


def test_lost_work_shows_while_the_next_life_runs(tmp_path, clock):
    path = tmp_path / "goodput.json"
    killed = Ledger(clock(), clock)
    killed.keep(path)
    killed.resumed(0)
    killed.finished(1)
    for step in range(2, 12):
        clock.pass_(1)
        killed.finished(step)
    killed.write()
    ledger = Ledger(clock(), clock)
    ledger.keep(path)
    assert ledger.log_scalars()["goodput/seconds/lost"] == 0
    ledger.resumed(8)
    assert ledger.log_scalars()["goodput/seconds/lost"] == 3


def test_it_is_written_every_few_seconds_at_most(tmp_path, clock):
    path = tmp_path / "goodput.json"
    ledger = Ledger(clock(), clock)
    ledger.keep(path)
    written = path.stat().st_ino  # every write makes a new file
    clock.pass_(1)
    ledger.tick()
    assert path.stat().st_ino == written
    clock.pass_(10)
    ledger.tick()
    assert read_lives(path)[0].wall_seconds == 11


def test_a_slow_disk_is_written_to_less_often(tmp_path, clock, monkeypatch):
    writes = []

    def slow(path, value):
        writes.append(value)
        clock.pass_(1)

    monkeypatch.setattr(goodput, "write_json", slow)
    ledger = Ledger(clock(), clock)
    ledger.keep(tmp_path / "goodput.json")
    for _ in range(1000):
        clock.pass_(1)
        ledger.tick()
    assert 2 <= len(writes) <= 7


def test_without_a_file_nothing_is_written(ledger, clock):
    ledger.resumed(0)
    clock.pass_(60)
    ledger.tick()
    ledger.write()
    assert ledger.finish()["goodput/lives"] == 1


def test_a_full_disk_ends_nothing(tmp_path, clock, monkeypatch, caplog):
    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    ledger = Ledger(clock(), clock)
    path = tmp_path / "goodput.json"
    ledger.keep(path)
    before = path.read_bytes()
    monkeypatch.setattr(goodput, "write_json", full)
    ledger.write()
    ledger.finish()
    assert path.read_bytes() == before
    assert caplog.text.count("goodput is being lost: No space left on device") == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[{",
        b"{}x",
        b"3",
        b"[3]",
        b"[null]",
        b'{"a": 1}',
        b'[{"began": 1.0}]',
        b'[{"began": 1, "seconds": 3, "first_step": 0, "last_step": 0, "finished": false}]',
        b'[{"began": 1, "seconds": {"step": NaN}, "first_step": 0, "last_step": 0,'
        b' "finished": false}]',
        b'[{"began": 1, "seconds": {}, "first_step": "0", "last_step": 0, "finished": false}]',
        b'[{"began": null, "seconds": {}, "first_step": 0, "last_step": 0, "finished": false}]',
    ],
)
def test_a_broken_file_is_begun_anew_with_a_warning(tmp_path, clock, caplog, content):
    path = tmp_path / "goodput.json"
    path.write_bytes(content)
    ledger = Ledger(clock(), clock)
    ledger.keep(path)
    assert "goodput is counted anew" in caplog.text
    assert len(json.loads(path.read_bytes())) == 1


def test_a_step_costs_microseconds(ledger):
    ledger = Ledger(time.monotonic())
    ledger.resumed(0)
    begin = time.process_time()
    for step in range(1000):
        with ledger.spending("data_wait"):
            pass
        ledger.finished(step)
        ledger.tick()
    assert time.process_time() - begin < 0.1  # 0.1 ms a step, with type checks
