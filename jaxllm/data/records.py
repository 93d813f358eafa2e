"""Records: what every source yields, whatever it is stored in and whichever stage reads it."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable


class Record(NamedTuple):
    """One record of a source."""

    fields: Mapping[str, Any]
    """Values by the names of docs/formats.md: `text`; `prompt` and `response`; `chosen`; …"""
    file: str
    """Where it stands: the file's path, or the entry of the configuration."""
    line: int
    """Line of the file, or number of the record, counted from 1."""
    group: str = ""
    """Records of one group stay on one side of the held-out split; empty: it stands alone."""


class BadLine(NamedTuple):
    """A line or record that cannot be used, to be set aside."""

    file: str
    line: int
    reason: str


@runtime_checkable
class Source(Protocol):
    """An entry of `data.train` or `data.eval`, such as `corpus/*.jsonl.gz` or `builtin:pydocs`."""

    @property
    def name(self) -> str:
        """The entry as it was written, without its weight."""
        ...

    @property
    def marked(self) -> bool:
        """Whether `<s>` and `</s>` in a text mark documents, rather than being characters."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever the records may have; cheap next to reading them.

        Raises:
            UserError: the source cannot be read.
        """
        ...

    def records(self) -> Iterator[Record | BadLine]:
        """Reads from the start; the same records in the same order each time.

        Raises:
            UserError: the source cannot be read to its end, as a cut-off gzip file cannot.
        """
        ...
