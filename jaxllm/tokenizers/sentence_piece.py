"""Tokenizers run by SentencePiece, each kept as one `tokenizer.model`."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from jaxllm.files import write_bytes_atomically
from jaxllm.tokenizers.added_tokens import AddedTokens, check_added_tokens
from jaxllm.tokenizers.interface import (
    SENTENCEPIECE_FILE,
    Tokenizer,
    available_cores,
    check_unicode,
    write_config,
)
from jaxllm.tokenizers.special_ids import ROLES, Vocabulary, choose_special_ids
from jaxllm.tokenizers.special_tokens import is_marker

_SPACE_MARK = "\u2581"  # what SentencePiece writes for a space, and reads as one
_Model: Any = model_pb2.ModelProto  # type: ignore[attr-defined]  # made when imported
_Type = _Model.SentencePiece.Type


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer run by SentencePiece (Kudo & Richardson, 2018).

    Ids are those of SentencePiece itself, but for three things. Marks among the model's symbols,
    such as `<start_of_turn>`, are characters unless they are asked for. Control symbols, such as
    `</s>`, which SentencePiece never reads from text, are read if they are asked for; what stands
    between them is then encoded as a text of its own. And U+2581, which SentencePiece confuses
    with a space, is written byte by byte by models that lose nothing else, so that they lose
    nothing at all.
    """

    def __init__(
        self,
        model: bytes,
        asked: Mapping[str, str] | None = None,
        declared: Mapping[str, str] | None = None,
        added: AddedTokens = (),
    ):
        """Builds the tokenizer of a serialised `ModelProto`.

        Args:
            model: the content of a `.model` file.
            asked: special tokens that the configuration names (`choose_special_ids`).
            declared: special tokens that files beside it name.
            added: tokens that files beside it list, which the model itself must hold.

        Raises:
            ValueError: `model` is not a SentencePiece model, or lacks an added token.
            SpecialTokenError: the special tokens cannot be told.
        """
        proto = _Model()
        try:
            proto.ParseFromString(model)
            self._processor = SentencePieceProcessor(model_proto=model)
        except Exception as error:  # protobuf's and SentencePiece's own
            raise ValueError(f"is not a SentencePiece model ({error})") from None
        if not proto.pieces:
            raise ValueError("is not a SentencePiece model (it has no pieces)")
        self._model = model
        self.vocab_size = len(proto.pieces)
        self._hidden = frozenset(
            i for i, p in enumerate(proto.pieces) if p.type in (_Type.CONTROL, _Type.UNKNOWN)
        )
        controls = {proto.pieces[i].piece: [i] for i in self._hidden}
        ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
        marks = list(controls)
        for piece in proto.pieces:
            if piece.type == _Type.USER_DEFINED and is_marker(piece.piece):
                marks.append(piece.piece)
                piece.type = _Type.CONTROL  # never read from text
        self._plain = SentencePieceProcessor(model_proto=proto.SerializeToString())
        exact = _is_exact(proto)
        space_mark = {_SPACE_MARK: self._byte_ids(_SPACE_MARK)} if exact else {}
        self._given_ids = {False: space_mark, True: space_mark | controls}
        self._splitters = {parse: _splitter(given) for parse, given in self._given_ids.items()}

        check_added_tokens(added, ids.get)
        special = choose_special_ids(
            Vocabulary(
                ids.get, marks, proto.trainer_spec.byte_fallback, self._own_special_tokens()
            ),
            asked or {},
            declared or {},
        )
        self._set_special_ids(special, [ids[mark] for mark in marks])
        identity = str(special).encode() + model
        self.fingerprint = hashlib.blake2b(identity, digest_size=16).hexdigest()

    def _byte_ids(self, text: str) -> list[int]:
        return [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]

    def _own_special_tokens(self) -> dict[str, str]:
        roles = [role for role in ROLES if role != "mask_token"]  # which SentencePiece knows not
        own = {role: getattr(self._processor, role.replace("token", "id"))() for role in roles}
        return {role: self._processor.id_to_piece(i) for role, i in own.items() if i >= 0}

    def encode(self, text: str, parse_special_tokens: bool = False) -> list[int]:
        return self.encode_batch([text], parse_special_tokens, workers=1)[0]

    def encode_batch(
        self, texts: Sequence[str], parse_special_tokens: bool = False, workers: int = 0
    ) -> list[list[int]]:
        check_unicode(texts)
        processor = self._processor if parse_special_tokens else self._plain
        given = self._given_ids[parse_special_tokens]
        splitter = self._splitters[parse_special_tokens]
        parts = [splitter.split(text) if splitter else [text] for text in texts]
        between = [part for text in parts for part in text[::2]]  # the rest has ids of its own
        encoded = iter(processor.encode(between, num_threads=workers or available_cores()))
        return [
            [
                index
                for number, part in enumerate(text)
                for index in (given[part] if number % 2 else next(encoded))
            ]
            for text in parts
        ]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        known = [index for index in ids if 0 <= index < self.vocab_size]
        if skip_special_tokens:
            return self._processor.decode([index for index in known if index not in self._hidden])
        return "".join(self._spans(known))

    def _spans(self, ids: list[int]) -> Iterator[str]:
        for hidden, span in groupby(ids, self._hidden.__contains__):
            if hidden:
                yield from map(self._processor.id_to_piece, span)
            else:
                yield self._processor.decode(list(span))

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        write_config(directory, self._settings(self._processor.id_to_piece))
        write_bytes_atomically(directory / SENTENCEPIECE_FILE, self._model)


def _is_exact(proto: Any) -> bool:
    """Whether nothing but U+2581 is lost on the way to ids and back by a `ModelProto`."""
    normalizer = proto.normalizer_spec
    changes_text = (
        normalizer.precompiled_charsmap
        or normalizer.add_dummy_prefix
        or normalizer.remove_extra_whitespaces
    )
    return bool(proto.trainer_spec.byte_fallback and not changes_text)


def _splitter(given: Mapping[str, list[int]]) -> re.Pattern[str] | None:
    """Cuts a text at the strings whose ids are given; the longest comes first."""
    if not given:
        return None
    return re.compile(f"({'|'.join(map(re.escape, sorted(given, key=len, reverse=True)))})")
