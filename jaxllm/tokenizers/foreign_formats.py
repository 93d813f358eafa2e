"""Vocabulary files older than `tokenizer.json`: GPT-2's pair of files and BERT's word list."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxllm.tokenizers.special_ids import SpecialTokenError
from jaxllm.tokenizers.special_tokens import is_marker

VOCAB_JSON = "vocab.json"
MERGES_TXT = "merges.txt"
VOCAB_TXT = "vocab.txt"
_CLASS = "tokenizer_class"
_GPT2_CLASSES = ("GPT2", "Roberta", "Bart", "OPT")


def gpt2_definition(folder: Path, settings: Mapping[str, Any], declared: Mapping[str, str]) -> str:
    """The `tokenizer.json` of `vocab.json` and `merges.txt` in `folder`, split by GPT-2's rule.

    Args:
        folder: holds both files.
        settings: what `tokenizer_config.json` says.
        declared: special tokens by role.

    Raises:
        ValueError: a file is missing or broken, or `settings` name a class of tokenizer with
            other rules, which these two files do not hold.
    """
    name = settings.get(_CLASS) or _GPT2_CLASSES[0]
    if not str(name).startswith(_GPT2_CLASSES):
        raise ValueError(
            f"{name} splits text by rules that {VOCAB_JSON} and {MERGES_TXT} do not hold; "
            "save it by Transformers as tokenizer.json"
        )
    paths = [folder / VOCAB_JSON, folder / MERGES_TXT]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path.name} is missing beside it")
    try:
        model = models.BPE.from_file(*map(str, paths))
    except Exception as error:  # the library raises bare `Exception`
        raise ValueError(str(error)) from None
    backend = hf.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(settings.get("add_prefix_space", False))
    )
    backend.decoder = decoders.ByteLevel()
    # Ordinary tokens that look like marks, such as `[...]`, come from a merge.
    merges = json.loads(backend.to_str())["model"]["merges"]
    return _with_special_tokens(backend, declared, {left + right for left, right in merges})


def bert_definition(
    file: Path,
    settings: Mapping[str, Any],
    declared: Mapping[str, str],
    asked: Mapping[str, str],
) -> str:
    """The `tokenizer.json` of the word list `file`, whose line numbers are the ids.

    Text is lower-cased if `settings`, from `tokenizer_config.json`, say `do_lower_case`; where
    they do not, if no word has a capital.

    Args:
        file: one token a line.
        settings: what `tokenizer_config.json` says.
        declared: special tokens by role.
        asked: what the configuration says of them, which goes first.

    Raises:
        ValueError: the file is not UTF-8.
        SpecialTokenError: the unknown token asked for or declared, else `[UNK]`, is missing.
    """
    words = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocabulary = {word.removesuffix("\r"): number for number, word in enumerate(words)}
    unk = asked.get("unk_token") or declared.get("unk_token", "[UNK]")
    if unk not in vocabulary:
        raise SpecialTokenError(
            f"config.tokenizer.unk_token: {unk!r}, for words that cannot be expressed, is not in "
            "this list of tokens; name the one that is."
        )
    lowercase = settings.get("do_lower_case")
    if lowercase is None:
        lowercase = all(word == word.lower() for word in vocabulary if not is_marker(word))
    backend = hf.Tokenizer(models.WordPiece(vocabulary, unk_token=unk))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=bool(lowercase),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return _with_special_tokens(backend, {**declared, "unk_token": unk})


def _with_special_tokens(
    backend: hf.Tokenizer, declared: Mapping[str, str], learnt: Collection[str] = ()
) -> str:
    """The definition, with the tokens declared and all marks that were not `learnt` special."""
    vocabulary = backend.get_vocab()
    marks = {token for token in vocabulary if is_marker(token) and token not in learnt}
    special = (marks | set(declared.values())) & vocabulary.keys()
    backend.add_special_tokens(sorted(special, key=vocabulary.__getitem__))
    return backend.to_str()
