"""The `generate` stage: text from a run's model."""

from jaxllm.reporting.samples import read_samples


def test_the_prompt_is_continued(command, finished_run):
    result = command("generate", init=finished_run, prompt="abc", seed=1)
    assert result.code == 0
    assert result.out.startswith("abc")
    assert result.out.endswith("\n")


def test_greedy_and_seeded_text_is_the_same_each_time(command, finished_run):
    def text(**fields):
        return command("generate", init=finished_run, prompt="a", **fields).out

    assert text(temperature=0.0, seed=0) == text(temperature=0.0, seed=1)
    assert text(seed=0) == text(seed=0) != text(seed=1)


def test_several_samples_are_written_to_the_work_directory(command, finished_run, tmp_path):
    before = {path.name for path in finished_run.iterdir()}
    result = command("generate", tmp_path / "out", init=finished_run, prompt="b", samples=3)
    assert result.code == 0
    samples = read_samples(tmp_path / "out" / "samples.md")
    assert [(sample.step, sample.prompt) for sample in samples] == [(12, "b")] * 3
    assert result.out == "".join(f"b{sample.text}\n" for sample in samples)
    assert before == {path.name for path in finished_run.iterdir()}


def test_the_samples_of_a_run_are_not_overwritten(command, finished_run):
    before = (finished_run / "samples.md").read_bytes()
    result = command("generate", finished_run, init=finished_run)
    assert result.code == 2
    assert "holds a run" in result.err
    assert (finished_run / "samples.md").read_bytes() == before


def test_a_prompt_that_is_no_text_is_told(command, finished_run):
    result = command("generate", init=finished_run, prompt="\udcff")
    assert result.code == 2
    assert "config.prompt: is not Unicode text" in result.err
