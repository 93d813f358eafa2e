"""One training function per kind of tokenizer, by name."""

from collections.abc import Callable, Iterable

import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxllm.tokenizers import character_trainers
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer, byte_characters
from jaxllm.tokenizers.character_trainers import train_charbpe, train_wordpiece
from jaxllm.tokenizers.hugging_face import HuggingFaceTokenizer
from jaxllm.tokenizers.interface import Tokenizer
from jaxllm.tokenizers.sentencepiece_trainers import (
    train_sentencepiece_bpe,
    train_sentencepiece_unigram,
    train_unigram,
)
from jaxllm.tokenizers.special_tokens import SPECIAL_TOKENS

TRAINERS_VERSION = 2
"""Raised whenever a trainer, or a library it uses, makes another tokenizer of the same text."""


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Byte-level byte-pair encoding with GPT-2's splitting rule (Radford et al., 2019).

    Every string is encoded without loss, because all 256 bytes are in the vocabulary and nothing
    normalises the text. The vocabulary comes out smaller than asked for when the text runs out
    of pairs to merge.
    """
    backend = hf.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=byte_characters(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return HuggingFaceTokenizer(backend.to_str())


def train_bytes(texts: Iterable[str], vocab_size: int) -> ByteTokenizer:
    """Nothing to learn; there are always as many tokens as special tokens and bytes."""
    return ByteTokenizer()


TRAINERS: dict[str, Callable[[Iterable[str], int], Tokenizer]] = {
    "bpe": train_bpe,
    "wordpiece": train_wordpiece,
    "unigram": train_unigram,
    "charbpe": train_charbpe,
    "sentencepiece_bpe": train_sentencepiece_bpe,
    "sentencepiece_unigram": train_sentencepiece_unigram,
    "bytes": train_bytes,
}
"""The kinds of `TokenizerConfig.kind`: each takes the texts and the vocabulary size asked for."""

LOSSLESS = frozenset(TRAINERS) - {"wordpiece", "charbpe"}
"""The kinds that give every text back exactly."""

COUNTING_CHARACTERS = frozenset({"sentencepiece_bpe", "sentencepiece_unigram"})
"""The kinds that also hold most characters of the text, and tell themselves how many they need."""

SMALLEST_VOCABULARY: dict[str, int] = {
    kind: len(SPECIAL_TOKENS) + 256 if kind in LOSSLESS else character_trainers.SMALLEST
    for kind in TRAINERS
}
"""What each kind's vocabulary holds before it has learnt anything of the text."""
