"""Tokenizers: lossless, deterministic, never forged by text, and clear about what cannot be."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import from_dict
from jaxllm.errors import UserError
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.special_tokens import SPECIAL_TOKENS
from jaxllm.tokenizers.tokenizer import load_tokenizer
from jaxllm.tokenizers.training import train_tokenizer

TEXTS = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps on " * 3,
    "def jump(fox, dog):\n    return fox.over(dog)\n",
    "床前明月光，疑是地上霜。",
]
SIZE = 300


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TokenizerConfig(vocab_size=SIZE), TEXTS)


def test_special_tokens_have_the_stable_ids(tokenizer):
    assert SPECIAL_TOKENS[:4] == ("<pad>", "<s>", "</s>", "<unk>")
    ids = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id)
    assert ids == (0, 1, 2, 3)
    for number, token in enumerate(SPECIAL_TOKENS):
        assert tokenizer.decode([number], skip_special_tokens=False) == token
        assert tokenizer.decode([number]) == ""


def test_the_vocabulary_is_of_the_size_asked_for(tokenizer):
    assert tokenizer.vocab_size == SIZE
    assert max(max(ids) for ids in tokenizer.encode_batch(TEXTS)) == SIZE - 1


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(st.text(), st.sampled_from([*SPECIAL_TOKENS, " ", "\n", "\u200d", "👩‍👩‍👧", "é"]))
    ).map("".join)
)
def test_every_string_comes_back_and_no_text_makes_a_special_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(index >= len(SPECIAL_TOKENS) for index in ids)
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


def test_a_saved_tokenizer_is_the_same_one(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert loaded.fingerprint == tokenizer.fingerprint
    text = "the lazy </s> dog"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert 2 not in loaded.encode(text)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["tokenizer.json"]


def test_another_process_trains_the_same_tokenizer(tokenizer):
    code = (
        "from jaxllm.tokenizers.config import TokenizerConfig\n"
        "from jaxllm.tokenizers.training import train_tokenizer\n"
        f"print(train_tokenizer(TokenizerConfig(vocab_size={SIZE}), {TEXTS!r}).fingerprint)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == tokenizer.fingerprint, result.stderr


def test_other_texts_give_another_fingerprint(tokenizer):
    other = train_tokenizer(TokenizerConfig(vocab_size=SIZE), [*TEXTS, "zzzz zzzz zzzz zzzz"] * 9)
    assert other.fingerprint != tokenizer.fingerprint


def test_a_vocabulary_larger_than_the_text_gives_is_told():
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size: is 9999.* only (\d+) tokens") as e:
        train_tokenizer(TokenizerConfig(vocab_size=9999), TEXTS)
    possible = int(str(e.value).split("gives only ")[1].split()[0])
    assert train_tokenizer(TokenizerConfig(vocab_size=possible), TEXTS).vocab_size == possible


def test_a_vocabulary_smaller_than_the_bytes_is_told():
    with pytest.raises(UserError, match="raise it to 268"):
        train_tokenizer(TokenizerConfig(vocab_size=267), TEXTS)


def test_wrong_options_are_named():
    with pytest.raises(UserError, match=r"config\.tokenizer\.kind: must be one of bpe"):
        from_dict(TokenizerConfig, {"kind": "morse"}, "tokenizer")
    with pytest.raises(UserError, match=r"config\.tokenizer\.vocab_size"):
        from_dict(TokenizerConfig, {"vocab_size": 0}, "tokenizer")


def test_a_folder_without_a_usable_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no tokenizer here"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a readable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_our_special_tokens_is_told(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"</s>"', '"<end>"'))
    with pytest.raises(UserError, match="no token </s>"):
        load_tokenizer(tmp_path)
