"""The report page: complete, self-contained, and safe whatever a model wrote."""

import json
from html.parser import HTMLParser

import pytest

from jaxllm.errors import UserError
from jaxllm.reporting.goodput import CATEGORIES, Life, goodput_scalars
from jaxllm.reporting.metrics_file import MetricsFile
from jaxllm.reporting.report import comparison_bars, goodput, time_bars, write_report
from jaxllm.reporting.samples import append_samples

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> & 中文"

SUMMARY = {
    "eval/bits_per_byte": 1.6,
    "eval/loss": 2.7,
    "reference/gzip/bits_per_byte": 2.0,
    "reference/bigram/bits_per_byte": 2.4,
    "time/compile": 10.0,
    "time/train": 180.0,
    "time/total": 200.0,
    "data/bad_lines": 0,
}


class Page(HTMLParser):
    """Collects elements, attributes and text, and checks that elements close in order."""

    VOID = {"meta", "br", "img", "link", "input"}

    def __init__(self, html):
        super().__init__()
        self.elements, self.attributes, self.words, self._open = [], [], [], []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self.words.append(" ")

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


@pytest.fixture
def run_dir(tmp_path):
    run_dir = tmp_path / "first <run>"
    run_dir.mkdir()
    metrics = MetricsFile(run_dir / "metrics.jsonl")
    for step in range(1, 30):
        metrics.append(step, step, {"train/loss": 9.0 / step, EVIL: float(step)})
    append_samples(run_dir / "samples.md", 10, [("old prompt", "old text")])
    append_samples(run_dir / "samples.md", 20, [(EVIL, EVIL)])
    config = {"stage": "pretrain", "data": {"train": EVIL, "seq_len": 256}}
    versions = {"jax": "0.10.2"}
    (run_dir / "config.json").write_text(json.dumps({"config": config, "versions": versions}))
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY | {EVIL: 1.0}))
    return run_dir


def test_the_page_holds_every_section(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    text = Page(path.read_text()).text
    for words in (
        "first <run>",
        "pretrain · 29 steps",
        "1.600 bits per byte",
        "20% fewer bits than gzip -9",
        "token bigram 2.400",
        "Loss, nats",
        "old prompt",
        "compiling 10s",
        "everything else 10s",
        "bad lines set aside 0",
        "data.seq_len 256",
        "jax 0.10.2",
    ):
        assert words in text


def test_nothing_from_a_file_becomes_html(run_dir):
    page = Page(write_report(run_dir).read_text())
    assert not {"script", "img", "link", "iframe"} & set(page.elements)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.text.count("<script>alert(1)</script>") >= 4  # prompt, text, config, scores


def test_the_page_refers_to_nothing_outside_itself(run_dir):
    html = write_report(run_dir).read_text()
    assert "://" not in html
    for name, value in Page(html).attributes:
        if name in ("src", "href"):
            assert value.startswith("#")


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl", "samples.md", "summary.json"])
def test_each_file_may_be_missing(run_dir, missing):
    (run_dir / missing).unlink()
    assert "first <run>" in Page(write_report(run_dir).read_text()).text


def test_an_empty_run_directory_gives_a_page(tmp_path):
    Page(write_report(tmp_path).read_text())


def test_a_summary_that_is_not_finite_is_shown_as_such(run_dir):
    (run_dir / "summary.json").write_text('{"eval/bits_per_byte": NaN, "eval/loss": null}')
    assert "bits per byte nan" in Page(write_report(run_dir).read_text()).text


@pytest.mark.parametrize("content", ['{"half": ', "[1]"])
def test_a_broken_file_is_named(run_dir, content):
    (run_dir / "summary.json").write_text(content)
    with pytest.raises(UserError, match=r"summary\.json"):
        write_report(run_dir)


def test_no_run_directory(tmp_path):
    with pytest.raises(UserError, match="no such run directory"):
        write_report(tmp_path / "nowhere")


def test_comparison_is_sorted_with_the_model_among_the_references():
    bars = comparison_bars(SUMMARY)
    assert [bar.label for bar in bars] == ["this model", "gzip -9", "token bigram"]
    assert [bar.is_model for bar in bars] == [True, False, False]
    assert [bar.share for bar in bars] == pytest.approx([1.6 / 2.4, 2.0 / 2.4, 1.0])
    assert comparison_bars({"eval/bits_per_byte": 1.0}) == []


def test_shares_of_time_make_up_the_whole():
    assert [(bar.label, bar.share) for bar in time_bars(SUMMARY)] == [
        ("compiling", 0.05),
        ("training", 0.9),
        ("everything else", 0.05),
    ]
    too_short = time_bars(SUMMARY | {"time/total": 100.0})
    assert sum(bar.share for bar in too_short) == pytest.approx(1.0)


LIVES = [
    Life(0.0, dict.fromkeys(CATEGORIES, 0.0) | {"start": 10.0, "step": 20.0}, 0, 21),
    Life(40.0, dict.fromkeys(CATEGORIES, 0.0) | {"compile": 10.0, "step": 50.0}, 11, 62, True),
]


def test_goodput_is_told_of_all_lives(run_dir):
    (run_dir / "goodput.json").write_text(json.dumps([vars(life) for life in LIVES]))
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY | goodput_scalars(LIVES)))
    text = Page(write_report(run_dir).read_text()).text
    for words in (
        "Goodput 60.0% of 1m40s went into steps that count, over 2 lives of the process.",
        "lost steps, made again 10s (10.0%)",
        "down, between lives 10s (10.0%)",
        "began lasted from step to step steps lost",
        "1970-01-01 00:00:00 UTC 30s 0 21 10",
        "1970-01-01 00:00:40 UTC 1m00s 11 62 0",
    ):
        assert words in text
    assert "Goodput, over all lives" not in text  # it has its own section


def test_shares_of_goodput_make_up_the_whole():
    shown = goodput(LIVES)
    assert sum(bar.share for bar in shown.parts) == pytest.approx(1.0)
    assert len({bar.part for bar in shown.parts}) == len(shown.parts)
    assert goodput([]) is None


@pytest.mark.parametrize("content", ["", "[3]", "[]"])
def test_a_report_does_without_a_broken_goodput_file(run_dir, content):
    (run_dir / "goodput.json").write_text(content)
    assert "Goodput" not in Page(write_report(run_dir).read_text()).text
