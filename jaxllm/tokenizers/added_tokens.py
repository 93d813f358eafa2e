"""Tokens that files beside a tokenizer add to its vocabulary, as Transformers writes them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from jaxllm.tokenizers.interface import CONFIG_FILE, HF_FILE, read_json_object
from jaxllm.tokenizers.special_tokens import is_marker

_FILE = "added_tokens.json"
_KEY = "added_tokens_decoder"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")

AddedTokens = Sequence[tuple[int, AddedToken]]
"""Tokens with the ids that they must have, in the order of these."""


def read_added_tokens(
    folder: Path, settings: Mapping[str, Any], declared: Mapping[str, str]
) -> AddedTokens:
    """The tokens of `added_tokens.json`, and of `added_tokens_decoder` in `settings`.

    One that is not said to be special or not is so if it is declared, or written like a mark.

    Args:
        folder: may hold `added_tokens.json`, from token to id.
        settings: what `tokenizer_config.json` says; from id to token and its flags.
        declared: special tokens by role.

    Raises:
        ValueError: the tokens are not written in this way.
    """

    def token(content: str, flags: Mapping[str, Any]) -> AddedToken:
        special = flags.get("special", is_marker(content) or content in declared.values())
        given = {name: bool(flags[name]) for name in _FLAGS if name in flags}
        return AddedToken(content, special=bool(special), **{"normalized": not special} | given)

    described = settings.get(_KEY) or {}
    plain = read_json_object(folder / _FILE)
    try:
        found = {(int(i), flags["content"]): flags for i, flags in described.items()}
        found = {(int(i), content): {} for content, i in plain.items()} | found
        return [(i, token(content, found[i, content])) for i, content in sorted(found)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{_FILE} or {_KEY} beside it is malformed ({error!r})") from None


def check_added_tokens(added: AddedTokens, token_to_id: Callable[[str], int | None]) -> None:
    """Raises a ValueError for the first added token that has not the id it must have."""
    for index, token in added:
        found = token_to_id(token.content)
        if found != index:
            here = "it is not in this vocabulary" if found is None else f"here it has {found}"
            raise ValueError(
                f"{CONFIG_FILE} or {_FILE} beside it gives {token.content!r} the id {index}, but "
                f"{here}; let Transformers save both as one {HF_FILE}"
            )
