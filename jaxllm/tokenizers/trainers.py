"""One training function per kind of tokenizer, by name."""

from collections.abc import Callable, Iterable

import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxllm.tokenizers.special_tokens import SPECIAL_TOKENS
from jaxllm.tokenizers.tokenizer import HuggingFaceTokenizer, Tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
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
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return HuggingFaceTokenizer(backend)


TRAINERS: dict[str, Callable[[Iterable[str], int], Tokenizer]] = {"bpe": train_bpe}
"""The kinds of `TokenizerConfig.kind`: each takes the texts and the vocabulary size asked for."""

SMALLEST_VOCABULARY: dict[str, int] = {"bpe": len(SPECIAL_TOKENS) + 256}
"""What each kind's vocabulary holds before it has learnt anything."""
