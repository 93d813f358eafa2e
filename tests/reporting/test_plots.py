"""Curves as SVG inside a page."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from jaxllm.reporting.plots import (
    CSS_COLORS,
    MOST_POINTS,
    series,
    smoothed,
    task_charts,
    training_charts,
)


def run(steps=50, **others):
    return [
        {
            "step": step,
            "time": 0.1 * step,
            "train/loss": 9 - 0.1 * step,
            "train/learning_rate": 1e-3,
            "train/grad_norm": 1.0,
            "train/tokens_per_second": 1e4,
            **({"eval/loss": 5.0} if step % 10 == 0 else {}),
            **others,
        }
        for step in range(1, steps + 1)
    ]


def test_the_four_charts_come_first_and_changing_names_follow():
    metrics = [record | {"ppo/kl": 0.1 * record["step"], "constant": 1.0} for record in run()]
    assert [chart.title for chart in training_charts(metrics)] == [
        "Loss, nats",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
        "ppo/kl",
    ]


def test_charts_take_colours_and_fonts_from_the_page():
    for chart in training_charts(run()):
        ElementTree.fromstring(chart.svg)
        assert "var(--series-1)" in chart.svg and "<text" in chart.svg
        assert not any(placeholder in chart.svg for placeholder in CSS_COLORS.values())
        assert "DejaVu" not in chart.svg and "://" not in chart.svg


def test_ids_are_unique_over_all_charts_and_the_same_each_time():
    svgs = [chart.svg for chart in training_charts(run())]
    ids = [found for svg in svgs for found in set(re.findall(r' id="([^"]*)"', svg))]
    assert len(ids) == len(set(ids)) > 0
    assert svgs == [chart.svg for chart in training_charts(run())]


def test_any_name_and_value_can_be_drawn(recwarn):
    metrics = run(3)
    for position, record in enumerate(metrics):
        record |= {"奖励/<b>$x^$": position, "train/loss": [float("nan"), 2.0, 1.0][position]}
    chart = training_charts(metrics)[-1]
    ElementTree.fromstring(chart.svg)
    assert chart.title == "奖励/<b>$x^$" and "<b>" not in chart.svg
    assert not recwarn.list


@pytest.mark.parametrize("metrics", [[], [{"step": 1, "time": 0.0, "train/loss": 3.0}]])
def test_nothing_to_draw(metrics):
    assert training_charts(metrics) == []


def test_a_task_measured_with_several_numbers_of_examples_is_a_chart():
    summary = {
        f"evaluate/{task}/{shots}_shot/{name}": value
        for task in ("arc", "a/b")
        for shots in (8, 0, 2)
        for name, value in (("score", 0.5), ("stderr", None), ("chance", 0.25), ("cut", 0.0))
    }
    charts = task_charts(summary | {"evaluate/one/score": 0.5, "evaluate/two/3_shot/score": 0.5})
    titles = [f"{task}: score by examples in the prompt" for task in ("arc", "a/b")]
    assert [chart.title for chart in charts] == titles
    for chart in charts:
        ElementTree.fromstring(chart.svg)
        labels = re.findall(r"<text[^>]*>\s*([^<]*?)\s*</text>", chart.svg)
        assert labels[:3] == ["0", "2", "8"] and "examples" in labels
    assert task_charts({"eval/loss": 1.0}) == []


def test_long_runs_stay_light():
    assert sum(len(chart.svg) for chart in training_charts(run(5 * MOST_POINTS))) < 300_000


def test_series_leaves_out_what_is_not_finite():
    metrics = [{"step": 1, "a": float("nan")}, {"step": 2, "a": 2}, {"step": 3, "b": 1}]
    found = series(metrics, "a")
    np.testing.assert_array_equal(found.steps, [2.0])
    np.testing.assert_array_equal(found.values, [2.0])


def test_smoothing_keeps_constants_and_lines_and_calms_noise():
    np.testing.assert_allclose(smoothed(np.full(200, 3.0)), 3.0)
    line = np.arange(200.0)
    np.testing.assert_allclose(smoothed(line)[:190], line[:190])  # centred: no lag
    noise = np.random.default_rng(0).normal(size=1000)
    assert smoothed(noise)[100:].std() < 0.25
