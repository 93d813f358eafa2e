"""The tokenizer stage: one tokenizer for later runs, or several in one table."""

import json

import pytest

from jaxllm.tokenizers.tokenizer import load_tokenizer


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_one_tokenizer_is_kept_for_later_runs(command, tmp_path):
    result = command("tokenizer", tmp_path / "t", tokenizer__kind="sentencepiece_unigram")
    assert result.code == 0, result.err
    tokenizer = load_tokenizer(tmp_path / "t" / "tokenizer")
    assert tokenizer.vocab_size == 300
    found = summary(tmp_path / "t")
    assert found["tokenizer/sentencepiece_unigram/vocab_size"] == 300
    assert found["tokenizer/sentencepiece_unigram/lossless"] == 1
    assert found["tokenizer/sentencepiece_unigram/unknown"] == 0
    assert found["tokenizer/sentencepiece_unigram/train_seconds"] > 0
    assert "Tokenizers" in result.out


def test_several_are_compared_on_the_same_text_and_by_a_small_model(command, tmp_path):
    fields = {
        "compare": "bpe,bytes,sentencepiece_bpe",
        "comparison__train_bytes": 8000,
        "comparison__batch_size": 8,
        "comparison__model__layers": 1,
        "comparison__model__width": 16,
    }
    result = command("tokenizer", tmp_path / "t", **fields)
    assert result.code == 0, result.err
    found = summary(tmp_path / "t")
    assert found["tokenizer/bytes/bytes_per_token"] == 1
    assert found["tokenizer/bytes/vocab_size"] == 273
    assert found["tokenizer/bpe/bytes_per_token"] > 1.2
    assert found["tokenizer/bpe/lossless"] == found["tokenizer/bytes/lossless"] == 1
    for kind in ("bpe", "bytes", "sentencepiece_bpe"):
        assert found[f"tokenizer/{kind}/megabytes_per_second"] > 0
        assert found[f"tokenizer/{kind}/train_seconds"] > 0
        assert 0.5 < found[f"tokenizer/{kind}/bits_per_byte"] < 9
    steps = {
        kind: summary(tmp_path / "t" / "compared" / kind / "model")["train/steps"]
        for kind in ("bpe", "bytes")
    }
    assert steps["bytes"] > 1.2 * steps["bpe"]  # equal bytes are more rows of shorter tokens
    page = (tmp_path / "t" / "report.html").read_text()
    assert "<h2>Tokenizers</h2>" in page
    again = command("tokenizer", tmp_path / "t", **fields)
    assert again.code == 0, again.err
    assert "train tokenizer" not in again.err  # what is made is not made again
    assert summary(tmp_path / "t") == found
    fields["compare"] += ",charbpe"
    fields["tokenizer__vocab_size"] = 300
    more = command("tokenizer", tmp_path / "t", **fields)
    assert more.code == 2  # too little text for it, which is told when the rest is there
    assert "not in the table: charbpe" in more.err.splitlines()[-1]
    assert summary(tmp_path / "t") == found


def test_those_that_exist_are_measured_each_in_a_row_of_its_own(command, tmp_path):
    for name, size in (("a", 280), ("b", 300)):
        assert command("tokenizer", tmp_path / name, tokenizer__vocab_size=size).code == 0
    paths = [tmp_path / name / "tokenizer" for name in "ab"]
    result = command("tokenizer", tmp_path / "t", compare=f"{paths[0]},{paths[1]}")
    assert result.code == 0, result.err
    found = summary(tmp_path / "t")
    for name, path in zip("ab", paths, strict=True):
        before = summary(tmp_path / name)["tokenizer/bpe/bytes_per_token"]
        assert found[f"tokenizer/{path}/bytes_per_token"] == before


def test_a_lossy_tokenizer_has_no_bits_per_byte(command, tmp_path):
    fields = {"compare": "bytes,charbpe", "comparison__train_bytes": 1000}
    model = {"comparison__model__layers": 1, "comparison__model__width": 16}
    result = command("tokenizer", tmp_path / "t", tokenizer__vocab_size=60, **fields, **model)
    assert result.code == 0, result.err
    found = summary(tmp_path / "t")
    assert found["tokenizer/bytes/bits_per_byte"] > 0
    assert found["tokenizer/charbpe/lossless"] < 1
    assert "tokenizer/charbpe/bits_per_byte" not in found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compare": "bpe,morse"}, "config.compare: morse is no kind (bpe, "),
        ({"tokenizer__path": "/nowhere"}, "config.tokenizer.path: /nowhere"),
        ({"tokenizer__vocab_size": 99}, "raise it to 273"),
        ({"comparison__batch_size": 0}, "config.comparison.batch_size"),
        ({"compare": "bpe,bpe"}, "config.compare: names a tokenizer twice"),
    ],
)
def test_mistakes_are_told_in_one_line(command, tmp_path, fields, message):
    result = command("tokenizer", tmp_path / "t", **fields)
    assert result.code == 2
    assert message in result.err.splitlines()[-1]
    if "compare" in fields:  # found before anything was begun
        assert not (tmp_path / "t" / "config.json").exists()
