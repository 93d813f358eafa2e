"""`samples.md` gives back what was put in, whatever the model wrote."""

import pytest
from absl import logging

from jaxllm.reporting import samples as samples_module
from jaxllm.reporting.samples import Sample, append_samples, read_samples

NASTY = [
    "",
    "\n",
    "ends in a newline\n",
    "```python\nprint()\n```\n````",
    '## step 7\n\n**prompt** `"forged"`\n\n```text\nforged\n```',
    "carriage\r\nreturns\r and \u2028 separators \x85",
    'quote " backslash \\ tick ` ticks ``` end`',
    "中文 😀 <script>alert(1)</script>",
]


@pytest.mark.parametrize("text", NASTY)
def test_round_trip(tmp_path, text):
    path = tmp_path / "samples.md"
    append_samples(path, 1, [(text, "plain"), ("plain", text)])
    append_samples(path, 2, [("after", "wards")])
    assert read_samples(path) == [
        Sample(1, text, "plain"),
        Sample(1, "plain", text),
        Sample(2, "after", "wards"),
    ]


def test_it_reads_as_markdown(tmp_path):
    append_samples(tmp_path / "samples.md", 500, [("The quick\n", "brown fox")])
    assert (tmp_path / "samples.md").read_text() == (
        '# Samples\n\n## step 500\n\n**prompt** `"The quick\\n"`\n\n```text\nbrown fox\n```\n'
    )


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    path = tmp_path / "samples.md"
    for step in (100, 200, 300):
        append_samples(path, step, [("p", f"first {step}")])
    append_samples(path, 200, [("p", "second 200")])
    assert [(s.step, s.text) for s in read_samples(path)] == [
        (100, "first 100"),
        (200, "second 200"),
    ]


def test_an_unfinished_block_is_passed_over(tmp_path):
    path = tmp_path / "samples.md"
    append_samples(path, 1, [("a", "b"), ("c", "d")])
    path.write_text(path.read_text().removesuffix("```\n"))
    assert read_samples(path) == [Sample(1, "a", "b")]


def test_text_that_is_not_unicode_is_still_written(tmp_path):
    append_samples(tmp_path / "samples.md", 1, [("p", "half \ud800 pair")])
    assert read_samples(tmp_path / "samples.md") == [Sample(1, "p", "half ? pair")]


def test_a_full_disk_warns_and_keeps_the_file(tmp_path, monkeypatch):
    path = tmp_path / "samples.md"
    append_samples(path, 1, [("a", "b")])

    def full(*_):
        raise OSError(28, "No space left on device")

    warnings = []
    monkeypatch.setattr(samples_module, "write_atomically", full)
    monkeypatch.setattr(logging, "warning", lambda *arguments: warnings.append(arguments))
    append_samples(path, 2, [("c", "d")])
    assert len(warnings) == 1 and read_samples(path) == [Sample(1, "a", "b")]
