"""Tokenizers of every kind: lossless where they can be, deterministic, never forged by text."""

import json
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer
from jaxllm.tokenizers.interface import available_cores
from jaxllm.tokenizers.sizes import TooLargeError
from jaxllm.tokenizers.special_tokens import SPECIAL_TOKENS
from jaxllm.tokenizers.tokenizer import load_tokenizer
from jaxllm.tokenizers.trainers import LOSSLESS, TRAINERS

KINDS = sorted(TRAINERS)
every_kind = pytest.mark.parametrize("kind", KINDS)
PARTS = [
    *SPECIAL_TOKENS,
    *("</w>", "##a", "[UNK]", "<0x41>", "⁇", " ⁇ ", "\u2581", "\u2585", "\0", "\ufeff", "\ufffd"),
    *(" ", "  ", "\t", "\n", "\r\n", "\n\n\n", "\u00a0", "\u3000", "\u200b", "\u2028", "\x1b"),
    *("\u200d", "👩‍👩‍👧", "🇫🇷", "e\u0301", "\u0301", "ﬁ", "Å", "한", "ক্ষ", "the work", "明月"),
]
any_text = st.lists(st.one_of(st.text(), st.sampled_from(PARTS))).map("".join)


@every_kind
def test_special_tokens_have_the_stable_ids(trained, kind):
    tokenizer = trained(kind)
    assert SPECIAL_TOKENS[:4] == ("<pad>", "<s>", "</s>", "<unk>")
    assert SPECIAL_TOKENS[12:16] == ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
    assert SPECIAL_TOKENS[16:] == ("<mask>",)
    ids = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id)
    assert (*ids, tokenizer.mask_id) == (0, 1, 2, 3, 16)
    assert tokenizer.special_ids == {*range(17)}
    for number, token in enumerate(SPECIAL_TOKENS):
        assert tokenizer.decode([number], skip_special_tokens=False) == token
        assert tokenizer.decode([number]) == ""


@every_kind
def test_special_tokens_are_read_from_text_only_when_asked(trained, kind):
    tokenizer = trained(kind)
    every_id = list(range(len(SPECIAL_TOKENS)))
    text = "".join(SPECIAL_TOKENS)
    assert tokenizer.encode(text, parse_special_tokens=True) == every_id
    assert tokenizer.encode_batch([text], parse_special_tokens=True) == [every_id]
    for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text])):
        assert not ({*ids} - {tokenizer.unk_id}) & {*every_id}
    parsed = tokenizer.encode("the<|user|>work</s>", parse_special_tokens=True)
    expected = [*tokenizer.encode("the"), 13, *tokenizer.encode("work"), 2]
    assert parsed == expected


@pytest.mark.parametrize("kind", sorted(LOSSLESS))
@settings(max_examples=200)
@given(text=any_text)
def test_every_string_comes_back_and_no_text_makes_a_special_token(trained, kind, text):
    tokenizer = trained(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(len(SPECIAL_TOKENS) <= index < tokenizer.vocab_size for index in ids)
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


@pytest.mark.parametrize("kind", sorted(LOSSLESS))
@settings(max_examples=50)
@given(text=any_text)
def test_what_is_parsed_comes_back_too(trained, kind, text):
    tokenizer = trained(kind)
    ids = tokenizer.encode(text, parse_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", sorted({*TRAINERS} - LOSSLESS))
@settings(max_examples=100)
@given(text=any_text)
def test_kinds_that_lose_text_give_unknown_and_forge_nothing(trained, kind, text):
    tokenizer = trained(kind)
    ids = tokenizer.encode(text)
    assert all(index == 3 or len(SPECIAL_TOKENS) <= index < 420 for index in ids)
    assert tokenizer.encode_batch([text]) == [ids]


@every_kind
def test_nothing_is_forged_after_training_on_text_full_of_special_tokens(kind):
    tokens = [*SPECIAL_TOKENS, "</w>", "##a"]
    words = [f"{a}fox{b}dog b" for a in tokens for b in tokens] + [token * 30 for token in tokens]
    texts = [" ".join(words), "".join(words), "\n".join(words)]
    try:
        tokenizer = TRAINERS[kind](texts, 600)
    except TooLargeError as error:
        tokenizer = TRAINERS[kind](texts, error.possible)
    for text in ("a </s>b", "x</s>y", "fox</w>dog", "dog</w></w>fox", *tokens, *words, *texts):
        ids = tokenizer.encode(text)
        assert not {*ids} & {*range(3), *range(4, 17)}
        if kind != "wordpiece" and 3 not in ids:
            kept = text if kind in LOSSLESS else " ".join(text.split())
            assert tokenizer.decode(ids) == kept


def test_kinds_that_lose_text_lose_what_their_page_says(trained):
    wordpiece, charbpe = trained("wordpiece"), trained("charbpe")
    assert wordpiece.decode(wordpiece.encode("The  work\nis\tdone (here).")) == (
        "The work is done ( here )."
    )
    assert wordpiece.decode(wordpiece.encode("明月光")) == "明 月 光"
    assert charbpe.decode(charbpe.encode("The  work\nis\tdone (here).")) == (
        "The work is done (here)."
    )
    assert wordpiece.encode("a" * 101) == [3] and 3 not in wordpiece.encode("a" * 100)
    assert wordpiece.decode(wordpiece.encode("the\ufffd\x07work\u200b")) == "thework"
    assert wordpiece.decode(wordpiece.encode("the work .")) == "the work."
    for tokenizer in (wordpiece, charbpe):
        assert 3 in tokenizer.encode("한")


@every_kind
def test_bytes_that_are_no_text_and_ids_that_are_no_tokens_do_not_break_decoding(trained, kind):
    tokenizer = trained(kind)
    for index in range(tokenizer.vocab_size):
        assert isinstance(tokenizer.decode([index], skip_special_tokens=False), str)
    nowhere = [tokenizer.vocab_size, 2**31 - 1, 2**40, 2**70, -1, -(2**40)]
    for skip in (True, False):
        assert tokenizer.decode(nowhere, skip_special_tokens=skip) == ""
    assert tokenizer.encode("") == [] == tokenizer.encode_batch([])
    assert tokenizer.decode([]) == ""


@every_kind
def test_half_a_surrogate_pair_is_refused_in_one_way(trained, kind):
    tokenizer = trained(kind)
    message = r"not Unicode text \(a lone surrogate, U\+D800, at character 3\)"
    for parse in (False, True):
        for encode in (
            lambda parse: tokenizer.encode("the\ud800", parse),
            lambda parse: tokenizer.encode_batch(["the", "the\ud800"], parse),
        ):
            with pytest.raises(ValueError, match=message) as error:
                encode(parse)
            assert type(error.value) is ValueError


def test_saved_ids_of_bytes_stay_when_a_special_token_is_added(tmp_path, monkeypatch):
    before = ByteTokenizer()
    before.save(tmp_path)
    module = "jaxllm.tokenizers.byte_tokenizer"
    monkeypatch.setattr(f"{module}.SPECIAL_TOKENS", (*SPECIAL_TOKENS, "<new>"))
    after = load_tokenizer(tmp_path)
    assert (after.vocab_size, after.fingerprint) == (273, before.fingerprint)
    text = "az<new><s>"
    assert after.encode(text, True) == before.encode(text, True)
    assert ByteTokenizer((*SPECIAL_TOKENS, "<new>")).fingerprint != before.fingerprint


def test_a_tokenizer_saved_before_there_was_a_mask_is_the_one_it_was(tmp_path):
    before = ByteTokenizer(SPECIAL_TOKENS[:16])
    before.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings.pop("mask_token") is None  # which was not written then
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.vocab_size, loaded.mask_id) == (272, None)
    # Runs and token stores of that time are found by this name.
    assert loaded.fingerprint == "9f70f29cae37d21d81a8cd1bc53b2d42"


@every_kind
def test_a_saved_tokenizer_is_the_same_one(trained, kind, tmp_path):
    tokenizer = trained(kind)
    trained("bytes" if kind != "bytes" else "sentencepiece_bpe").save(tmp_path / "a")
    tokenizer.save(tmp_path / "a")  # replaces the other
    loaded = load_tokenizer(tmp_path / "a")
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    text = "the work \u2581 </s> 明月"
    assert loaded.encode(text) == tokenizer.encode(text)
    loaded.save(tmp_path / "b")
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    main = "tokenizer.model" if kind.startswith("sentencepiece") else "tokenizer.json"
    assert sorted(files) == sorted([main, "tokenizer_config.json"])


@pytest.mark.parametrize("kind", ["wordpiece", "sentencepiece_bpe", "bytes"])
def test_a_save_that_is_cut_short_leaves_no_mixture(trained, kind, tmp_path, monkeypatch):
    trained("bpe").save(tmp_path)
    whole = iter([True, False])  # the configuration is written, the tokenizer is not

    def sync(handle):
        if not next(whole):
            raise OSError("disk is full")

    monkeypatch.setattr("os.fsync", sync)
    with pytest.raises(OSError, match="full"):
        trained(kind).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer_config.json"]


def test_another_process_on_one_core_trains_the_same_tokenizers(trained, texts):
    code = (
        "import json, os, sys\n"
        "if hasattr(os, 'sched_setaffinity'):\n"  # not on macOS
        "    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from jaxllm.tokenizers.config import TokenizerConfig\n"
        "from jaxllm.tokenizers.training import train_tokenizer\n"
        "texts = json.load(sys.stdin)\n"
        f"for kind in {KINDS}:\n"
        "    print(train_tokenizer(TokenizerConfig(kind, 420), texts).fingerprint)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(texts), capture_output=True, text=True
    )
    expected = [trained(kind).fingerprint for kind in KINDS]
    assert result.stdout.split() == expected, result.stderr
    assert len({*expected}) == len(KINDS)


@every_kind
@pytest.mark.parametrize("workers", [0, 1, 2, 64])
def test_batches_do_not_depend_on_the_number_of_workers(trained, kind, workers, monkeypatch):
    module = "jaxllm.tokenizers.hugging_face.available_cores"
    monkeypatch.setattr(module, lambda: 4)
    tokenizer = trained(kind)
    batch = [f"the work {'</s>' * (i % 3)} number {i}\n" for i in range(50)]
    for parse in (False, True):
        expected = [tokenizer.encode(text, parse) for text in batch]
        assert tokenizer.encode_batch(batch, parse, workers) == expected


@every_kind
def test_threads_that_do_and_do_not_parse_do_not_disturb_each_other(trained, kind):
    tokenizer = trained(kind)
    text = "the work </s>"
    expected = {parse: tokenizer.encode(text, parse) for parse in (False, True)}
    wrong = []

    def run(parse):
        for _ in range(200):
            if tokenizer.encode(text, parse) != expected[parse]:
                wrong.append(parse)

    threads = [threading.Thread(target=run, args=(parse,)) for parse in (False, True) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert expected[False] != expected[True]


def test_there_is_a_core_to_use():
    assert available_cores() >= 1
