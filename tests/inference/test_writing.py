"""A text while it is written: what is shown of it, where it ends, and how it joins its prompt."""

import itertools

import numpy as np
import pytest
import tokenizers as hf

from jaxllm.inference.requests import Request, Sampling
from jaxllm.inference.writing import Writing
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.hugging_face import HuggingFaceTokenizer
from jaxllm.tokenizers.training import train_tokenizer


def written_in_bursts(tokenizer, prompt, ids, burst, **options):
    """What is shown after each burst, and the completion."""
    request = Request(prompt, Sampling(len(ids), **options), stop_ids=(tokenizer.eos_id,))
    writing, shown = Writing(request, tokenizer, shown=True), []
    for begin in range(0, len(ids), burst):
        some = np.array([*ids[begin : begin + burst], -1])
        writing.extend(some, np.zeros(len(some), np.float32))
        shown.append(writing.settled_text())
        if writing.finish:
            break
    return shown, writing.completion()


def byte_fallback_tokenizer():
    """In the manner of Llama 2: bytes for what is no token, a blank before each word, and the one
    that begins a text left out."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "\u2581a", "\u2581b"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    vocabulary |= {f"<0x{byte:02X}>": len(pieces) + byte for byte in range(256)}
    backend = hf.Tokenizer(
        hf.models.BPE(
            vocabulary,
            [("\u2581", "a"), ("\u2581", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = hf.normalizers.Sequence(
        [hf.normalizers.Prepend("\u2581"), hf.normalizers.Replace(" ", "\u2581")]
    )
    decoders = hf.decoders
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return HuggingFaceTokenizer(backend.to_str())


@pytest.mark.parametrize("make_tokenizer", [ByteTokenizer, byte_fallback_tokenizer])
@pytest.mark.parametrize("burst", [1, 3, 100])
def test_what_is_shown_never_changes_and_has_no_half_characters(make_tokenizer, burst):
    tokenizer, text = make_tokenizer(), "a é漢字é b"
    ids = tokenizer.encode(text)
    shown, done = written_in_bursts(tokenizer, (tokenizer.bos_id,), ids, burst)
    assert shown[-1] == done.text == text
    assert all("\ufffd" not in part for part in shown)
    assert all(later.startswith(part) for part, later in itertools.pairwise(shown))


@pytest.mark.parametrize("make_tokenizer", [ByteTokenizer, byte_fallback_tokenizer])
def test_a_stop_string_ends_a_text_at_the_same_token_whatever_the_bursts(make_tokenizer):
    tokenizer = make_tokenizer()
    ids = tokenizer.encode("a aé漢字é b")
    found = [
        written_in_bursts(tokenizer, (tokenizer.bos_id,), ids, burst, stop=("字", "é"))
        for burst in (1, 3, 100)
    ]
    assert {done for _, done in found} == {found[0][1]}
    assert found[0][1].text == "a a"
    assert found[0][1].finish == "stop"
    assert not any("é" in part for shown, _ in found for part in shown)


def test_what_may_be_the_beginning_of_a_stop_string_is_not_shown_yet():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("a<e b<end> c")
    shown, done = written_in_bursts(tokenizer, (tokenizer.bos_id,), ids, 1, stop=("<end>",))
    assert shown == ["a", "a", "a", "a<e ", "a<e b", *["a<e b"] * 5]
    assert done.text == "a<e b"


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "charbpe", "sentencepiece_bpe", "llama"])
def test_a_prompt_and_its_continuation_make_the_whole_text(kind):
    words = "the quick brown fox jumps over the lazy dog"
    if kind == "llama":
        tokenizer, words = byte_fallback_tokenizer(), "a b a b"
    else:
        sizes = {"wordpiece": 90, "charbpe": 90}
        config = TokenizerConfig(kind=kind, vocab_size=sizes.get(kind, 305))
        tokenizer = train_tokenizer(config, [words] * 20)
    ids = tokenizer.encode(words)
    for cut in range(1, len(ids)):
        _, done = written_in_bursts(tokenizer, tuple(ids[:cut]), ids[cut:], 100)
        assert tokenizer.decode(ids[:cut]) + done.text == words
