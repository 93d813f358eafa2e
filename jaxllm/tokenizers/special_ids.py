"""Decides which tokens of a vocabulary made elsewhere open, close, fill, and stand for unknown."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence

from jaxllm.errors import UserError
from jaxllm.tokenizers.interface import SpecialIds

_KNOWN_NAMES = {
    "bos_token": (
        "<s>",
        "<|begin_of_text|>",
        "<bos>",
        "[CLS]",
        "<|startoftext|>",
        "<｜begin▁of▁sentence｜>",
        "<|endoftext|>",
    ),
    "eos_token": (
        "</s>",
        "<|end_of_text|>",
        "<eos>",
        "[SEP]",
        "<｜end▁of▁sentence｜>",
        "<|endoftext|>",
        "<|im_end|>",
    ),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "unk_token": ("<unk>", "[UNK]"),
    "mask_token": ("<mask>", "[MASK]"),
}
ROLES = tuple(_KNOWN_NAMES)
_EXAMPLES = 6  # tokens shown when none is near to the one asked for


class SpecialTokenError(UserError):
    """A special token is missing, or two clash; the message names the field that mends it."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What the choice of special tokens needs to know of a tokenizer."""

    token_to_id: Callable[[str], int | None]
    marks: Sequence[str]
    """Tokens that are special, or look so: the candidates that messages offer."""
    never_unknown: bool
    """Whether every text can be expressed, so that the unknown token is never given."""
    own: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Tokens by role that the model itself names; some models do so without having them."""


def choose_special_ids(
    vocabulary: Vocabulary, asked: Mapping[str, str], declared: Mapping[str, str]
) -> SpecialIds:
    """The ids of the roles `bos_token`, `eos_token`, `pad_token`, `unk_token` and `mask_token`.

    Each is the token asked for, else the one declared, else the model's own, else the first known
    name that is in the vocabulary. A missing pad is eos, a missing bos is eos, and a missing unk
    or mask is None.

    Args:
        vocabulary: the tokens to choose from.
        asked: what the configuration says, by role; empty texts ask for nothing.
        declared: what the files beside the tokenizer say, by role.

    Raises:
        SpecialTokenError: a token asked for or declared is not in the vocabulary (but a mask that
            is only declared may be missing); there is no eos; unk is the same token as bos or eos;
            or the mask asked for is one of the others.
    """
    found = {
        role: _find(role, vocabulary, asked, declared) for role in ROLES if role != "mask_token"
    }
    eos = found["eos_token"]
    if eos is None:
        raise SpecialTokenError(
            "no token that ends a document is known in this vocabulary; name one in "
            f"config.tokenizer.eos_token{_offer('', vocabulary)}."
        )
    bos = eos if found["bos_token"] is None else found["bos_token"]
    pad = eos if found["pad_token"] is None else found["pad_token"]
    unk = found["unk_token"]
    if unk is not None and unk in (bos, eos):
        same = [role for role, i in (("bos_token", bos), ("eos_token", eos)) if i == unk]
        _check_clash(same, vocabulary, asked)
        unk = None
    others = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}
    return SpecialIds(bos, eos, pad, unk, _mask(vocabulary, asked, declared, others))


def _mask(
    vocabulary: Vocabulary,
    asked: Mapping[str, str],
    declared: Mapping[str, str],
    others: Mapping[str, int | None],
) -> int | None:
    """The mask, which few models need: where none is asked for, one that cannot be is none."""
    wanted = asked.get("mask_token", "")
    if not wanted and vocabulary.token_to_id(declared.get("mask_token", "")) is None:
        declared = {}
    index = _find("mask_token", vocabulary, asked, declared)
    same = [role for role, other in others.items() if other == index is not None]
    if same and wanted:
        raise SpecialTokenError(
            f"config.tokenizer.mask_token: {wanted!r} is {same[0]} too, so what is hidden could "
            f"not be told from it; name another{_offer('', vocabulary)}."
        )
    return None if same else index


def _find(
    role: str, vocabulary: Vocabulary, asked: Mapping[str, str], declared: Mapping[str, str]
) -> int | None:
    name = asked.get(role) or declared.get(role)
    if name:
        index = vocabulary.token_to_id(name)
        if index is None:
            who = "" if asked.get(role) else ", which the files beside the tokenizer name,"
            raise SpecialTokenError(
                f"config.tokenizer.{role}: {name!r}{who} is not one token of this vocabulary"
                f"{_offer(name, vocabulary)}."
            )
        return index
    for name in (vocabulary.own.get(role), *_KNOWN_NAMES[role]):
        index = vocabulary.token_to_id(name) if name else None
        if index is not None:
            return index
    return None


def _check_clash(same: list[str], vocabulary: Vocabulary, asked: Mapping[str, str]) -> None:
    """An error, unless the roles `same` are unk too by habit alone, as GPT-2's files have it."""
    at_fault = next((role for role in ("unk_token", *same) if asked.get(role)), None)
    if at_fault is None and vocabulary.never_unknown:
        return
    other = at_fault if at_fault in same else same[0]
    field = at_fault or other
    raise SpecialTokenError(
        f"config.tokenizer.{field}: {other} and unk_token are the same token, so text that cannot "
        f"be expressed would mark documents; name another{_offer('', vocabulary)}."
    )


def _offer(name: str, vocabulary: Vocabulary) -> str:
    near = difflib.get_close_matches(name, vocabulary.marks, n=3, cutoff=0.5)
    near = near or list(vocabulary.marks[:_EXAMPLES])
    return f": it has {', '.join(near)}" if near else ""
