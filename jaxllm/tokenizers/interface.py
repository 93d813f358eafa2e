"""What every tokenizer can do, whatever library does the work."""

import abc
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from jaxllm.files import write_json
from jaxllm.tokenizers.builtin_templates import suitable_template

HF_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
TEMPLATE_KEY = "chat_template"


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Which ids open and close documents, fill rows and stand for what cannot be expressed."""

    bos: int
    eos: int
    pad: int
    unk: int | None
    # Not shown, because fingerprints are made of what is: no text is ever encoded to it.
    mask: int | None = dataclasses.field(default=None, repr=False)


class Tokenizer(abc.ABC):
    """Text to token ids and back. One tokenizer may be used from several threads at once.

    Encoding adds no token of its own, neither at the start nor at the end. Unless it is asked to
    parse special tokens, it reads the text of one, such as a literal `</s>`, as the characters it
    is made of: special tokens enter only by id, so no text can forge them.
    """

    vocab_size: int
    """Number of ids, special tokens included; every id is below it."""
    bos_id: int
    """Opens a document."""
    eos_id: int
    """Closes a document."""
    pad_id: int
    """Fills rows. Masks come from lengths, never from this value."""
    unk_id: int | None
    """What a tokenizer that is not lossless gives for text it cannot express; None: no token."""
    mask_id: int | None
    """Stands in the place of a token that a model has to fill in; None: no token."""
    special_ids: frozenset[int]
    """The ids above and those of all other marks: what ordinary text is not made of."""
    fingerprint: str
    """Hexadecimal hash of everything that decides the encoding, and of the ids that documents are
    laid out with: `bos_id`, `eos_id`, `pad_id` and `unk_id`."""
    chat_template: str | None = None
    """Jinja source by which messages become text, where the files that it was loaded from have one;
    no part of `fingerprint`."""

    def special_tokens(self) -> dict[str, int]:
        """The texts of the special tokens, with their ids."""
        texts = {self.decode([i], skip_special_tokens=False): i for i in sorted(self.special_ids)}
        return {text: index for text, index in texts.items() if text.strip()}

    def _set_special_ids(self, ids: SpecialIds, special: Iterable[int]) -> None:
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = ids.bos, ids.eos, ids.pad, ids.unk
        self.mask_id = ids.mask
        optional = {index for index in (ids.unk, ids.mask) if index is not None}
        self.special_ids = frozenset({ids.bos, ids.eos, ids.pad, *optional, *special})

    def _settings(self, id_to_token: Callable[[int], str | None]) -> dict[str, str | None]:
        """What `tokenizer_config.json` holds: the tokens of the roles, and the chat template.

        Without a template of its own it gets the built-in one that its tokens suit, if there is
        one, so that other programs can chat with what was trained here.
        """
        template = self.chat_template or suitable_template(self.special_tokens())
        tokens = {
            "bos_token": id_to_token(self.bos_id),
            "eos_token": id_to_token(self.eos_id),
            "pad_token": id_to_token(self.pad_id),
            "unk_token": None if self.unk_id is None else id_to_token(self.unk_id),
            "mask_token": None if self.mask_id is None else id_to_token(self.mask_id),
        }
        return tokens | ({TEMPLATE_KEY: template} if template else {})

    @abc.abstractmethod
    def encode(self, text: str, parse_special_tokens: bool = False) -> list[int]:
        """Token ids of one text; special tokens written out in it become their ids if asked.

        Raises:
            ValueError: half of a surrogate pair stands alone in the text, which is no Unicode.
        """

    @abc.abstractmethod
    def encode_batch(
        self, texts: Sequence[str], parse_special_tokens: bool = False, workers: int = 0
    ) -> list[list[int]]:
        """Token ids of each text, on at most `workers` cores (0: all that this process may use).

        Raises:
            ValueError: as `encode`.
        """

    @abc.abstractmethod
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""

    @abc.abstractmethod
    def save(self, directory: str | Path) -> None:
        """Writes what `load_tokenizer` and Transformers' `AutoTokenizer` need.

        A reader sees the old tokenizer, none, or the new one, never a mixture.
        """


def check_unicode(texts: Iterable[str]) -> None:
    """Raises a ValueError for the first text that UTF-8 cannot hold; the libraries differ in it."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise ValueError(
                f"not Unicode text (a lone surrogate, U+{code:04X}, at character {error.start})"
            ) from None


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_config(directory: Path, settings: Mapping[str, str | None]) -> None:
    """Writes `tokenizer_config.json` into `directory`, which from here on holds no tokenizer yet.

    The caller writes the tokenizer's own file next: readers look for that one first, and so never
    see it beside another's configuration.

    Args:
        directory: made if it is missing.
        settings: the tokens of the roles (`special_ids.ROLES`), the chat template, and what else is
            kept.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in (HF_FILE, SENTENCEPIECE_FILE, *TEMPLATE_FILES):
        (directory / name).unlink(missing_ok=True)
    # Transformers reads either file by this class; LlamaTokenizer would take unigram for BPE.
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(directory / CONFIG_FILE, fixed | dict(settings))


def read_json_object(path: Path) -> dict:
    """The JSON object in `path`; an empty one if there is no such file.

    Raises:
        ValueError: it is not UTF-8, not JSON, or not an object.
    """
    if not path.is_file():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    return value
