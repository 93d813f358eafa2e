"""Training: the size asked for is the size got, and what cannot be is told in one line."""

import re

import pytest

from jaxllm.config import from_dict
from jaxllm.errors import UserError
from jaxllm.tokenizers.character_trainers import train_charbpe, train_wordpiece
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.trainers import (
    COUNTING_CHARACTERS,
    SMALLEST_VOCABULARY,
    TRAINERS,
    TRAINERS_VERSION,
)
from jaxllm.tokenizers.training import train_tokenizer

KINDS = sorted({*TRAINERS} - {"bytes"})
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_the_vocabulary_is_of_the_size_asked_for_and_used(trained, texts, kind):
    tokenizer = trained(kind)
    assert tokenizer.vocab_size == 420
    assert tokenizer.decode([419], skip_special_tokens=False)
    assert tokenizer.decode([420], skip_special_tokens=False) == ""
    used = {index for ids in tokenizer.encode_batch(texts) for index in ids}
    assert len(used) > 100


@every_kind
def test_a_vocabulary_larger_than_the_text_gives_is_told(kind):
    few = ["the quick brown fox, and the other fox"]
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size: is 9999.* only (\d+) tokens") as e:
        train_tokenizer(TokenizerConfig(kind, 9999), few)
    possible = int(re.search(r"only (\d+)", str(e.value))[1])
    assert train_tokenizer(TokenizerConfig(kind, possible), few).vocab_size == possible


@pytest.mark.parametrize("kind", sorted({*KINDS} - COUNTING_CHARACTERS))
def test_a_vocabulary_smaller_than_its_fixed_part_is_told(kind, texts):
    smallest = SMALLEST_VOCABULARY[kind]
    with pytest.raises(UserError, match=f"but special tokens and .* raise it to {smallest}"):
        train_tokenizer(TokenizerConfig(kind, smallest - 1), texts)


@pytest.mark.parametrize("size", [1, 20, 272, 273, 300])
@pytest.mark.parametrize("kind", sorted(COUNTING_CHARACTERS))
def test_a_vocabulary_smaller_than_the_characters_is_told(kind, size, texts, capfd):
    message = rf"is {size}, but special tokens, bytes and .* (\d+) or"
    with pytest.raises(UserError, match=message) as e:
        train_tokenizer(TokenizerConfig(kind, size), texts)
    needed = int(re.search(r"raise it to (\d+)", str(e.value))[1])
    assert train_tokenizer(TokenizerConfig(kind, needed), texts).vocab_size == needed
    assert capfd.readouterr().err == ""  # SentencePiece's own log stays away


@every_kind
@pytest.mark.parametrize("text", ["a", "a b", "明", "</s>", "the fox. the fox.", "明月 ab, abc"])
def test_the_size_that_the_message_gives_works(kind, text):
    for size in (21, 22, 25, 280, 2000):
        try:
            assert train_tokenizer(TokenizerConfig(kind, size), [text]).vocab_size == size
        except UserError as error:
            if found := re.search(r"(?:lower|raise) it to (\d+)", str(error)):
                possible = int(found[1])
                assert train_tokenizer(TokenizerConfig(kind, possible), [text]).vocab_size == (
                    possible
                )
            else:
                few = r"text is too little for (wordpiece|charbpe): .* and 21 are the fewest"
                assert re.search(few, str(error)) or (text == "</s>" and "no text" in str(error))


@every_kind
def test_no_text_is_told(kind):
    for nothing in ([], ["", ""], ["\n", " "]):
        if kind in ("bpe", "unigram") and "\n" in nothing:
            continue  # white space is text to them
        with pytest.raises(UserError, match=r"config\.tokenizer.*text"):
            train_tokenizer(TokenizerConfig(kind, 300), nothing)


def test_bytes_have_their_own_number_and_say_so(capsys):
    config = TokenizerConfig("bytes", 8192)
    assert train_tokenizer(config, []).vocab_size == SMALLEST_VOCABULARY["bytes"] == 273
    assert capsys.readouterr().err == (
        "config.tokenizer.vocab_size: is 8192, but bytes have 273 tokens\n"
    )
    assert train_tokenizer(TokenizerConfig("bytes", 273), []).encode("az") == [17 + 97, 17 + 122]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("train", [train_wordpiece, train_charbpe])
def test_an_alphabet_too_large_keeps_its_commonest_and_leaves_room(train):
    rare = "".join(chr(0x4E00 + i) for i in range(2000))
    text = f"fox box foxes boxes {rare} " + "fox box " * 50
    tokenizer = train([text], 116)
    assert tokenizer.vocab_size == 116
    fox, unknown = tokenizer.encode("fox"), tokenizer.encode(rare[-1])
    assert len(fox) == 1
    assert unknown == [3]


@pytest.mark.parametrize(
    ("kind", "size"), [("sentencepiece_bpe", 284), ("sentencepiece_unigram", 282), ("unigram", 275)]
)
def test_long_lines_and_reserved_characters_are_learnt_from_all_the_same(kind, size):
    line = "zyx wvu " * 5000 + "\0\u2581\u2585\t zyx"
    tokenizer = train_tokenizer(TokenizerConfig(kind, size), [line])
    assert len(tokenizer.encode("zyx zyx zyx")) < 8


def test_wrong_options_are_named():
    with pytest.raises(UserError, match=r"config\.tokenizer\.kind: must be one of bpe, wordpiece"):
        from_dict(TokenizerConfig, {"kind": "morse"}, "tokenizer")
    for size in (0, 2**24 + 1, 3_000_000_000):
        with pytest.raises(UserError, match=r"config\.tokenizer\.vocab_size: must be"):
            from_dict(TokenizerConfig, {"vocab_size": size}, "tokenizer")
    for role in ("bos", "eos", "pad", "unk", "mask"):
        with pytest.raises(UserError, match=rf"config\.tokenizer\.{role}_token: .* path is empty"):
            from_dict(TokenizerConfig, {f"{role}_token": "</s>"}, "tokenizer")


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "charbpe", "sentencepiece_bpe"])
def test_the_largest_vocabulary_does_not_end_the_process(kind):
    with pytest.raises(UserError, match="the training text gives only"):
        train_tokenizer(TokenizerConfig(kind, 2**24), ["the fox and the other fox"])


def test_trainers_that_give_other_tokenizers_have_another_version():
    texts = ["the fox and the other foxes, then a box\n"] * 3
    sizes = {"bpe": 291, "wordpiece": 61, "charbpe": 61, "sentencepiece_bpe": 301}
    made = {
        kind: TRAINERS[kind](texts, size).encode("then other boxes") for kind, size in sizes.items()
    }
    assert TRAINERS_VERSION == 2
    # When this fails, raise TRAINERS_VERSION, so that what was trained before is trained again.
    assert made == {
        "bpe": [274, 94, 289, 284, 281],
        "wordpiece": [51, 53, 49, 46],
        "charbpe": [54, 56, 35, 48, 17, 42],
        "sentencepiece_bpe": [274, 295, 283, 284, 286, 280],
    }
