"""Trainers whose vocabularies begin with characters rather than bytes: WordPiece and BPE."""

import copy
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from typing import IO

import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxllm.tokenizers.hugging_face import HuggingFaceTokenizer
from jaxllm.tokenizers.special_tokens import SPECIAL_TOKENS, UNK

SMALLEST = len(SPECIAL_TOKENS) + 4
"""Room for one letter in its two forms, and as much to learn."""
_ALPHABET_SHARE = 0.5  # of the vocabulary at most, so that there is room to learn
_END_OF_WORD = "</w>"
_CONTINUED = "##"
# The library would give a merge that spells a special token, inside of a word, the id of that
# token, and delete a merged `</w>` when decoding. What is learnt from must not spell them.
_MARK = re.compile("|".join(map(re.escape, (*SPECIAL_TOKENS, _END_OF_WORD))))


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """BERT's vocabulary and longest-match rule (Devlin et al., 2019), case and accents kept.

    Words are split at spaces, and punctuation marks and Chinese characters stand alone; white
    space is not kept, and characters outside the alphabet are unknown.
    """
    backend = hf.Tokenizer(models.WordPiece({}, unk_token=UNK))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix=_CONTINUED)

    def forms(character: str, alone: bool) -> list[str]:
        return [character] if alone else [character, _CONTINUED + character]

    def trainer(tokens: list[str], alphabet: list[str]) -> trainers.Trainer:
        return trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=tokens,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            continuing_subword_prefix=_CONTINUED,
            show_progress=False,
        )

    return _train(backend, texts, vocab_size, forms, trainer)


def train_charbpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Byte-pair encoding of characters with marked ends of words (Sennrich et al., 2016).

    Words are what stands between white space, of which only one space is given back; characters
    outside the alphabet are unknown.
    """
    texts = (_MARK.sub(lambda mark: f"{mark[0][:-1]} >", text) for text in texts)
    backend = hf.Tokenizer(models.BPE(unk_token=UNK, end_of_word_suffix=_END_OF_WORD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.BPEDecoder(suffix=_END_OF_WORD)

    def forms(character: str, alone: bool) -> list[str]:
        return [character, character + _END_OF_WORD]

    def trainer(tokens: list[str], alphabet: list[str]) -> trainers.Trainer:
        return trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=tokens,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            end_of_word_suffix=_END_OF_WORD,
            show_progress=False,
        )

    return _train(backend, texts, vocab_size, forms, trainer)


def _train(
    backend: hf.Tokenizer,
    texts: Iterable[str],
    vocab_size: int,
    forms: Callable[[str, bool], list[str]],
    trainer: Callable[[list[str], list[str]], trainers.Trainer],
) -> HuggingFaceTokenizer:
    """Trains `backend` with an alphabet of the commonest characters that leaves room to learn.

    The library numbers the second form of a character (`##x`, `x</w>`) when it meets one, in an
    order that changes from run to run, and beyond the size asked for. So all forms are handed to
    it first, as if they were special tokens, which needs the characters before it starts: the
    texts pass through a temporary file.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        counts = _spool(texts, file)
        room = int(_ALPHABET_SHARE * (vocab_size - len(SPECIAL_TOKENS)))
        alphabet, tokens = _alphabet(backend, counts, forms, room)
        trained = _trained_copy(backend, file, alphabet, tokens, trainer)
        missing = vocab_size - trained.get_vocab_size()
        if missing:  # too little to learn: more characters take what it left
            alphabet, tokens = _alphabet(backend, counts, forms, len(tokens) + missing)
            trained = _trained_copy(backend, file, alphabet, tokens, trainer)
    content = json.loads(trained.to_str())
    content["added_tokens"] = content["added_tokens"][: len(SPECIAL_TOKENS)]
    return HuggingFaceTokenizer(json.dumps(content))


def _trained_copy(
    backend: hf.Tokenizer,
    file: IO[str],
    alphabet: list[str],
    tokens: list[str],
    trainer: Callable[[list[str], list[str]], trainers.Trainer],
) -> hf.Tokenizer:
    """`backend` trained on the texts in `file`, with `tokens` next to the special ones."""
    trained = copy.deepcopy(backend)
    file.seek(0)
    lines = (json.loads(line) for line in file)
    trained.train_from_iterator(lines, trainer([*SPECIAL_TOKENS, *tokens], alphabet))
    return trained


def _spool(texts: Iterable[str], file: IO[str]) -> Counter[str]:
    """Writes the texts, one a line, and counts their characters."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
        file.write(json.dumps(text) + "\n")
    return counts


def _alphabet(
    backend: hf.Tokenizer,
    counts: Counter[str],
    forms: Callable[[str, bool], list[str]],
    room: int,
) -> tuple[list[str], list[str]]:
    """The commonest characters whose forms fit into `room`, and these forms."""
    alphabet: list[str] = []
    tokens: list[str] = []
    for character, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        words = _words(backend, f"a{character}a")
        if character not in "".join(words):  # white space, or a control character
            continue
        new = forms(character, len(words) == 3)
        if len(tokens) + len(new) > room:
            break
        alphabet.append(character)
        tokens += new
    return alphabet, tokens


def _words(backend: hf.Tokenizer, text: str) -> list[str]:
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
