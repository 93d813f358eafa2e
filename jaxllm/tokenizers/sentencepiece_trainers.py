"""Trainers that learn pieces with SentencePiece, for its own kinds and for byte-level Unigram."""

import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

import tokenizers as hf
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import decoders, models, pre_tokenizers

from jaxllm.tokenizers.byte_tokenizer import byte_characters
from jaxllm.tokenizers.hugging_face import HuggingFaceTokenizer
from jaxllm.tokenizers.sentence_piece import SentencePieceTokenizer
from jaxllm.tokenizers.sizes import NoTextError, TooLargeError, TooSmallError
from jaxllm.tokenizers.special_tokens import BOS, EOS, PAD, SPECIAL_TOKENS, UNK

# Lines, and runs of newlines apart from them, so that no piece spans both. SentencePiece passes
# over sentences above 4192 bytes and those with NUL or its own marks for space and unknown.
_SENTENCE = re.compile("[^\n\0\u2581\u2585]{1,1000}|\n{1,16}")
_WORD_BREAK = "\x01"  # stands in no byte-level word
_TOO_LARGE = re.compile(r"Please set it to a value <= (\d+)")
_NO_TEXT = re.compile(r"(sentences|required_chars)_\.empty\(\)")  # nothing but its own marks
_TOO_SMALL = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")


def train_sentencepiece_bpe(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Byte-pair encoding of characters, with spaces and newlines as characters like others."""
    return _train_sentencepiece("bpe", texts, vocab_size)


def train_sentencepiece_unigram(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """The likeliest division into pieces under a unigram model of them (Kudo, 2018)."""
    return _train_sentencepiece("unigram", texts, vocab_size)


def train_unigram(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """A unigram model (Kudo, 2018) of bytes, within the words of GPT-2's splitting rule.

    SentencePiece learns the pieces, because the trainer of Hugging Face is slower, is not
    deterministic, and can stop below the size asked for.
    """
    splitting = pre_tokenizers.ByteLevel(add_prefix_space=False)
    extra = len(SPECIAL_TOKENS) - 1  # SentencePiece itself insists on one: unknown
    learnt = _learn(
        _byte_level_sentences(texts, splitting),
        vocab_size,
        extra,
        model_type="unigram",
        pretokenization_delimiter=_WORD_BREAK,
        character_coverage=1.0,
        max_sentence_length=1 << 20,
        split_by_unicode_script=False,  # the characters stand for bytes, not for themselves
        split_by_number=False,
        add_dummy_prefix=False,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        unk_piece=UNK,
    )
    pieces = SentencePieceProcessor(model_proto=learnt)
    scored = [(token, 0.0) for token in SPECIAL_TOKENS]
    scored += [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(1, len(pieces))]
    backend = hf.Tokenizer(models.Unigram(scored, SPECIAL_TOKENS.index(UNK), byte_fallback=False))
    backend.pre_tokenizer = splitting
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return HuggingFaceTokenizer(backend.to_str())


def _byte_level_sentences(
    texts: Iterable[str], splitting: pre_tokenizers.PreTokenizer
) -> Iterator[str]:
    """Words with breaks between them; before the first text all bytes, so that each is known."""
    empty = True
    for text in texts:
        words = [word[:1000] for word, _ in splitting.pre_tokenize_str(text)]
        for begin in range(0, len(words), 100):
            if empty:
                yield _WORD_BREAK.join(byte_characters())
            empty = False
            yield _WORD_BREAK.join(words[begin : begin + 100])


def _train_sentencepiece(
    model_type: str, texts: Iterable[str], vocab_size: int
) -> SentencePieceTokenizer:
    model = _learn(
        (sentence for text in texts for sentence in _SENTENCE.findall(text)),
        vocab_size,
        0,
        model_type=model_type,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,  # indentation
        pad_id=SPECIAL_TOKENS.index(PAD),
        bos_id=SPECIAL_TOKENS.index(BOS),
        eos_id=SPECIAL_TOKENS.index(EOS),
        unk_id=SPECIAL_TOKENS.index(UNK),
        pad_piece=PAD,
        bos_piece=BOS,
        eos_piece=EOS,
        unk_piece=UNK,
        control_symbols=list(SPECIAL_TOKENS[4:]),
    )
    return SentencePieceTokenizer(model)


def _learn(sentences: Iterator[str], vocab_size: int, extra: int, **options: Any) -> bytes:
    """Serialised model of `vocab_size - extra` pieces.

    Raises:
        TooLargeError, TooSmallError: the sentences give fewer pieces, or need more; sizes in the
            messages count `extra`.
        NoTextError: there are no sentences.
    """
    first = next(sentences, None)
    if first is None:
        raise NoTextError
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_chain(first, sentences),
            model_writer=model,
            vocab_size=vocab_size - extra,
            normalization_rule_name="identity",
            num_threads=16,  # sums are split by threads: another number gives other last digits
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        if found := _TOO_LARGE.search(str(error)):
            raise TooLargeError(int(found[1]) + extra) from None
        if _NO_TEXT.search(str(error)):
            raise NoTextError from None
        if found := _TOO_SMALL.search(str(error)):
            raise TooSmallError(int(found[1]) + extra) from None
        raise
    return model.getvalue()


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest
