"""The type that every tokenizer has, and loading one from files of any known format."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxllm.errors import UserError
from jaxllm.tokenizers import foreign_formats
from jaxllm.tokenizers.added_tokens import read_added_tokens
from jaxllm.tokenizers.byte_tokenizer import KIND_KEY, ByteTokenizer
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.hugging_face import HuggingFaceTokenizer
from jaxllm.tokenizers.interface import (
    CONFIG_FILE,
    HF_FILE,
    SENTENCEPIECE_FILE,
    TEMPLATE_FILES,
    TEMPLATE_KEY,
    Tokenizer,
    read_json_object,
)
from jaxllm.tokenizers.sentence_piece import SentencePieceTokenizer
from jaxllm.tokenizers.special_ids import ROLES, SpecialTokenError

__all__ = ["Tokenizer", "configured_tokenizer", "load_tokenizer"]

_MAP_FILE = "special_tokens_map.json"


def configured_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer at `config.path`, with the special tokens that `config` names.

    Raises:
        UserError: as `load_tokenizer`; the message begins with the field at fault.
    """
    try:
        return load_tokenizer(config.path, config)
    except SpecialTokenError:
        raise
    except UserError as error:
        raise UserError(f"config.tokenizer.path: {error}") from None


def load_tokenizer(path: str | Path, config: TokenizerConfig | None = None) -> Tokenizer:
    """The tokenizer at `path`, with its chat template; nothing that lies there is executed.

    Args:
        path: a folder, in which the first is taken of `tokenizer.json` (as `Tokenizer.save` and
            Hugging Face write it), `tokenizer.model` or another SentencePiece `.model`,
            `vocab.json` with `merges.txt` (GPT-2's format), and `vocab.txt` (BERT's); or one of
            these files.
        config: names special tokens by its fields `bos_token`, `eos_token`, `pad_token`,
            `unk_token` and `mask_token`; what it leaves empty, the files beside it tell.

    Raises:
        UserError: there is no tokenizer at `path`, it cannot be read, or its special tokens
            cannot be told.
    """
    file = _find(Path(path))
    asked = dataclasses.asdict(config) if config else {}
    settings = _json_object(file.parent / CONFIG_FILE)
    names = _json_object(file.parent / _MAP_FILE)
    try:
        tokenizer = _load(file, asked, settings, _declared(names) | _declared(settings))
    except SpecialTokenError as error:
        raise SpecialTokenError(f"{error} (tokenizer: {file})") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: is not a readable tokenizer: {error}") from None
    tokenizer.chat_template = _chat_template(file.parent, settings)
    return tokenizer


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    for name in (HF_FILE, SENTENCEPIECE_FILE):
        if (path / name).is_file():
            return path / name
    others = sorted(path.glob("*.model"))
    if len(others) > 1:
        raise UserError(f"{path}: has several .model files; name one of them.")
    candidates = [*others, path / foreign_formats.VOCAB_JSON, path / foreign_formats.VOCAB_TXT]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(f"{path}: there is no tokenizer here ({HF_FILE} is missing).")


def _load(
    file: Path, asked: Mapping[str, str], settings: dict[str, Any], declared: dict[str, str]
) -> Tokenizer:
    if settings.get(KIND_KEY) == "bytes" and file.suffix == ".json":
        return ByteTokenizer.from_definition(file.read_text(encoding="utf-8"), asked, declared)
    added = read_added_tokens(file.parent, settings, declared)
    if file.suffix == ".model":
        return SentencePieceTokenizer(file.read_bytes(), asked, declared, added)
    if file.name in (foreign_formats.VOCAB_JSON, foreign_formats.MERGES_TXT):
        definition = foreign_formats.gpt2_definition(file.parent, settings, declared)
    elif file.suffix == ".txt":
        definition = foreign_formats.bert_definition(file, settings, declared, asked)
    elif file.suffix == ".json":
        definition = file.read_text(encoding="utf-8")
    else:
        raise ValueError("the name ends in none of .json, .model and .txt")
    return HuggingFaceTokenizer(definition, asked, declared, added)


def _json_object(path: Path) -> dict[str, Any]:
    """As `read_json_object`; what goes wrong is told with the name of the file."""
    with _named(path):
        return read_json_object(path)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: this file of the tokenizer cannot be read: {error}") from None


def _declared(settings: Mapping[str, Any]) -> dict[str, str]:
    """The tokens of the roles, each written as a string or as `{"content": string, …}`."""
    declared = {}
    for role in ROLES:
        token = settings.get(role)
        if isinstance(token, Mapping):
            token = token.get("content")
        if isinstance(token, str) and token:
            declared[role] = token
    return declared


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The template of a file of its own, else what `tokenizer_config.json` says.

    Of several by name it is the one called `default`.
    """
    jinja, processor = (folder / name for name in TEMPLATE_FILES)
    if jinja.is_file():
        with _named(jinja):
            return jinja.read_text(encoding="utf-8")
    found = settings.get(TEMPLATE_KEY) or _json_object(processor).get(TEMPLATE_KEY)
    if isinstance(found, list):
        default = (e for e in found if isinstance(e, Mapping) and e.get("name") == "default")
        found = next(default, {}).get("template")
    return found if isinstance(found, str) and found else None
