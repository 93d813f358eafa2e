"""Who answers in the stage `generate_data`: its fields, and what is checked of them."""

import dataclasses
import json
import os
import re
import urllib.parse
from typing import Any

from jaxllm.errors import UserError
from jaxllm.inference.endpoint import Connection

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class AnsweringTeacherFields:
    """Who answers: a model on this machine, or one behind a URL."""

    init: str = ""
    """Run directory or Hugging Face folder of the model that answers; or else `url`."""
    template: str = ""
    """How messages become text for `init`: `chatml`, `llama3`, `bos_separated`, or a file with a
    Jinja template; empty: that by which it was tuned, else `bos_separated`."""
    system: str = ""
    """System message that the teacher is asked with; it is not written to the data."""
    url: str = ""
    """Of an endpoint like OpenAI's, up to what `/chat/completions` follows, as in
    `http://localhost:8000/v1`."""
    model: str = ""
    """Name of the model at `url`."""
    key_variable: str = ""
    """Name of the environment variable that holds the key for `url`, such as `OPENAI_API_KEY`;
    empty: none is sent. The key itself is written nowhere."""
    concurrency: int = 8
    """Requests to `url` at the same time."""
    retries: int = 5
    """How often a request that fails is made again, after 1, 2, 4, … seconds, or as the server
    asks, but a minute at the most."""
    timeout: float = 120.0
    """Seconds that an answer of `url` may take."""
    extra: str = ""
    """JSON object of further fields of each request to `url`, in the place of those of the same
    name; null leaves one out, as in `{"seed": null, "reasoning_effort": "low"}`."""

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}")
        if self.timeout <= 0:
            raise ValueError("timeout: must be positive")
        if self.key_variable and not _VARIABLE.fullmatch(self.key_variable):
            # It may be the key, so it is not shown.
            raise ValueError("key_variable: is the name of an environment variable, not a key")
        for name in ("model", "system"):
            try:
                getattr(self, name).encode()
            except UnicodeEncodeError:  # bytes of a command line that are not UTF-8
                raise ValueError(f"{name}: is not Unicode text") from None
        if self.url:
            _check_url(self.url)
        self.extra_fields()

    def connection(self) -> Connection:
        """The endpoint, with the key from the environment.

        Raises:
            UserError: there is no key.
        """
        return Connection(
            self.url.rstrip("/"),
            self.model,
            _key(self.key_variable),
            self.concurrency,
            self.retries,
            self.timeout,
            self.extra_fields(),
        )

    def extra_fields(self) -> dict[str, Any]:
        """`extra` as it is sent.

        Raises:
            ValueError: it is no JSON object.
        """
        try:
            found = json.loads(self.extra or "{}")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError('extra: is no JSON object; write it as {"seed": null}')
        return found


def check_answering_teacher(teacher: AnsweringTeacherFields) -> None:
    """Checks that there is one teacher.

    Raises:
        UserError: there is none, or there are two, or something is given that it does not have.
    """
    if bool(teacher.init) == bool(teacher.url):
        raise UserError(
            "config.teacher.init: give the run directory or Hugging Face folder of a model, or "
            "config.teacher.url with an endpoint, and not both."
        )
    if teacher.url and not teacher.model:
        raise UserError("config.teacher.model: give the name of the model at config.teacher.url.")
    if teacher.init and (teacher.model or teacher.key_variable or teacher.extra):
        raise UserError(
            "config.teacher.init: is a model on this machine, which has no name, key or extra "
            "fields; leave those of config.teacher out."
        )
    if teacher.url and teacher.template:
        raise UserError("config.teacher.template: the endpoint has its own; leave it out.")


def _check_url(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise ValueError("url: is no URL; give one like http://localhost:8000/v1") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        # The configuration is kept, and shown.
        raise ValueError("url: holds more than a place; keys belong into teacher.key_variable")
    if not (good and url.isascii() and url.isprintable()) or " " in url:
        raise ValueError("url: is no URL of http or https; give one like http://localhost:8000/v1")


def _key(variable: str) -> str:
    """The key that the environment holds.

    Raises:
        UserError: it holds none; the message does not tell the name, which may be a key.
    """
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        raise UserError(
            "config.teacher.key_variable: there is no environment variable of that name, or "
            "nothing in it; set it to the key."
        )
    if not (key.isascii() and (key.isprintable() or not key)):
        raise UserError(
            "config.teacher.key_variable: the variable holds what cannot be sent as a key."
        )
    return key
