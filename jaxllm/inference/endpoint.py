"""A teacher behind a URL: any endpoint that takes OpenAI's `/chat/completions`.

Answers are asked for one by one, some at the same time. What may pass (a limit of requests, a fault
of the server, a connection that is lost, an answer that is none) is asked for again after a while,
which doubles each time and is partly drawn, so that what failed together does not come together.
"""

import dataclasses
import email.utils
import http.client
import json
import queue
import random
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from jaxllm.errors import UserError
from jaxllm.inference.requests import Sampling
from jaxllm.inference.teacher import (
    Answer,
    Failed,
    Outcome,
    Question,
    sample_seed,
    with_thinking,
)
from jaxllm.tokenizers.interface import check_unicode

A = TypeVar("A")
B = TypeVar("B")

FIRST_WAIT = 1.0
"""Seconds before what failed is asked for again, about; twice as many each time,"""
LONGEST_WAIT = 60.0
"""and so many at the most, also where the server asks for more."""

_PASSING = (408, 409, 425, 429)
_OF_THE_QUESTION = (400, 413, 422)
"""What a server says that cannot take the very question: it is too long, say."""
_PIECE, _MOST_BYTES = 1 << 16, 64 << 20
_SHOWN = 300  # signs of what a server says


class _Passing(Exception):
    """What failed, and may not fail again."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        """`wait`: seconds that the server asks for."""
        super().__init__(reason)
        self.wait = wait


class _Refused(Exception):
    """What will fail as often as it is asked for."""


@dataclasses.dataclass(frozen=True)
class Connection:
    """An endpoint and how it is asked."""

    url: str
    """That `/chat/completions` stands behind."""
    model: str
    key: str = dataclasses.field(default="", repr=False)
    """Sent as a bearer token, and shown nowhere; empty: none is."""
    concurrency: int = 8
    """Requests at the same time."""
    retries: int = 5
    """How often one that fails is asked again."""
    timeout: float = 120.0
    """Seconds that an answer may take."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of each request beside those below or in their place; None: it is left out."""


@dataclasses.dataclass(frozen=True)
class EndpointTeacher:
    """A model behind a URL."""

    connection: Connection
    sampling: Sampling
    seed: int = 0
    samples: int = 1
    """Answers to each question."""
    done: frozenset[int] = frozenset()
    """Numbers of questions that are answered already."""

    def answer(self, questions: Sequence[Question]) -> Iterator[list[Outcome]]:
        """See `Teacher`: some at a time means what has come until then.

        A question that cannot be answered is set aside; so is one that the server refuses as such,
        if it has answered others before, in an earlier life of the run too.

        Raises:
            UserError: the server refuses the requests: a wrong key, model or URL.
        """
        client = _Client(self.connection, bool(self.done))
        jobs = (
            (question, sample)
            for question in questions
            if question.number not in self.done
            for sample in range(self.samples)
        )

        def ask(job: tuple[Question, int]) -> Answer | Failed:
            question, sample = job
            return client.answer(self._body(question, sample))

        gathered: dict[int, dict[int, Answer | Failed]] = {}
        try:
            for results in _concurrently(ask, jobs, self.connection.concurrency):
                outcomes: list[Outcome] = []
                for (question, sample), answer in results:
                    answers = gathered.setdefault(question.number, {})
                    answers[sample] = answer
                    if len(answers) == self.samples:
                        del gathered[question.number]
                        outcomes.append((question, _together(answers)))
                if outcomes:
                    yield outcomes
        finally:
            client.stop()

    def _body(self, question: Question, sample: int) -> bytes:
        sampling = self.sampling
        unusual = {
            name: getattr(sampling, name)
            for name in ("top_p", "top_k", "min_p", "repetition_penalty", "stop")
            if getattr(sampling, name) != getattr(Sampling(), name)
        }
        body = {
            "model": self.connection.model,
            "messages": list(question.messages),
            **({"tools": list(question.tools)} if question.tools else {}),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": sample_seed(self.seed, question.number, sample, self.samples),
            **unusual,
            **self.connection.extra,
        }
        return json.dumps({k: v for k, v in body.items() if v is not None}).encode()


def _together(answers: Mapping[int, Answer | Failed]) -> Sequence[Answer] | Failed:
    """All answers to a question, by their numbers; if one has failed, why."""
    found: list[Answer] = []
    for _, answer in sorted(answers.items()):
        if isinstance(answer, Failed):
            return answer
        found.append(answer)
    return found


class _Client:
    """Asks an endpoint, from several threads."""

    def __init__(self, connection: Connection, has_answered: bool) -> None:
        """`has_answered`: whether it is known to answer some."""
        self._connection, self._has_answered = connection, has_answered
        self._where = f"{connection.url}/chat/completions"
        self._headers = {"Content-Type": "application/json", "User-Agent": "jaxllm"}
        if connection.key:
            self._headers["Authorization"] = f"Bearer {connection.key}"
        # One that follows would send the key to wherever it is sent itself.
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends waiting; nothing is asked any more."""
        self._stopped.set()

    def answer(self, body: bytes) -> Answer | Failed:
        """The answer to a request, or why there is none after all retries.

        Raises:
            UserError: the server refuses it, and not for the question's sake alone.
        """
        attempts, reason, wait = self._connection.retries + 1, "", 0.0
        for attempt in range(attempts):
            if attempt:
                self._stopped.wait(_waiting(attempt - 1, wait))
            if self._stopped.is_set():
                return Failed("was not asked any more")
            try:
                answer = _read(self._sent(body))
            except _Passing as error:
                reason, wait = str(error), error.wait
            except _Refused as error:
                return Failed(self._hidden(str(error)))
            else:
                self._has_answered = True
                return answer
        times = f"{attempts} times" if attempts > 1 else "once"
        return Failed(self._hidden(f"{reason} (asked {times})"))

    def _sent(self, body: bytes) -> bytes:
        """What the server gives back."""
        request = urllib.request.Request(self._where, body, self._headers)
        until = time.monotonic() + self._connection.timeout
        try:
            with self._opener.open(request, timeout=self._connection.timeout) as response:
                return _whole(response, until)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except TimeoutError:
            raise _Passing(f"no answer in {self._connection.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _Passing(f"no answer in {self._connection.timeout:g} s") from None
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise UserError(f"{self._where}: {_one_line(str(reason))}.") from None
            raise _Passing(f"{type(reason).__name__}: {_one_line(str(reason))}") from None

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        """What an answer other than 200 says."""
        try:
            said = _message(error.read(_PIECE))
        except (OSError, http.client.HTTPException):
            said = ""
        reason = self._hidden(f"{error.code} {error.reason}{': ' if said else ''}{said}")
        if error.code in _PASSING or error.code >= 500:
            return _Passing(reason, _asked_wait(error.headers.get("Retry-After", "")))
        if error.code in _OF_THE_QUESTION and self._has_answered:
            return _Refused(reason)
        return UserError(
            f"config.teacher.url: {self._where} refuses: {reason.rstrip('.')}; see that the URL, "
            "config.teacher.model and the key are right, and run the same command again."
        )

    def _hidden(self, text: str) -> str:
        """The text without the key, which a server may repeat."""
        key = self._connection.key
        return text.replace(key, "***") if key else text


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Takes a redirect for the refusal that it is."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _whole(response: http.client.HTTPResponse, until: float) -> bytes:
    """The body, of which each piece is in time, and the whole too."""
    pieces, size = [], 0
    while piece := response.read1(_PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > _MOST_BYTES:
            raise _Refused(f"an answer of more than {_MOST_BYTES >> 20} MiB")
        if time.monotonic() > until:
            raise TimeoutError
    return b"".join(pieces)  # of a connection that was lost, half an answer, which is no JSON


def _read(body: bytes) -> Answer:
    """The answer that a body holds."""
    try:
        found = json.loads(body)
        choice = found["choices"][0]
        message = choice["message"]
        text = message.get("content")
        thinking = message.get("reasoning_content") or message.get("reasoning") or ""
        if message.get("tool_calls"):
            raise _Refused("it answers by a tool call, which is no text")
        if text is None and thinking:
            text = ""  # it was cut off while it thought
        if not isinstance(text, str) or not isinstance(thinking, str):
            raise ValueError("its content is no text")
        text = with_thinking(thinking, text)
        check_unicode([text])
        tokens = (found.get("usage") or {}).get("completion_tokens")
        finish = choice.get("finish_reason")
        return Answer(
            text,
            finish if isinstance(finish, str) else "stop",
            tokens if isinstance(tokens, int) else None,
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        # Some servers answer 200, and an error in it.
        said = _message(body) or f"{type(error).__name__}: {error}"
        raise _Passing(f"an answer that is none ({_one_line(said)})") from None


def _message(body: bytes) -> str:
    """What a server says is wrong, in one line."""
    try:
        said = json.loads(body)
        error = said.get("error", said.get("detail", said.get("message", "")))
        error = error.get("message", "") if isinstance(error, dict) else error
        return _one_line(error if isinstance(error, str) else json.dumps(error))
    except (ValueError, AttributeError, RecursionError):
        return ""


def _one_line(text: str) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"


def _asked_wait(value: str) -> float:
    """Seconds that a `Retry-After` asks for, written as such or as a date."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _waiting(attempt: int, asked: float) -> float:
    """Seconds to wait after an attempt, counted from 0, of which the server has asked for some."""
    own = min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(attempt, 30)) * random.uniform(0.5, 1)
    return max(own, min(asked, LONGEST_WAIT))


def _concurrently(
    work: Callable[[A], B], jobs: Iterable[A], threads: int
) -> Iterator[list[tuple[A, B]]]:
    """What work makes of jobs, by so many threads; some at a time, as they come.

    The first error of one ends it. Threads that still work then are not waited for.
    """
    inbox: queue.SimpleQueue[A | None] = queue.SimpleQueue()
    outbox: queue.SimpleQueue[tuple[A, B | Exception]] = queue.SimpleQueue()

    def loop() -> None:
        while (job := inbox.get()) is not None:
            try:
                outbox.put((job, work(job)))
            except Exception as error:
                outbox.put((job, error))

    left, out = iter(jobs), 0
    for _ in range(threads):
        threading.Thread(target=loop, daemon=True).start()
    try:
        while True:
            # As many again wait, so that no thread waits for whoever takes the results.
            while out < 2 * threads and (job := next(left, None)) is not None:
                inbox.put(job)
                out += 1
            if not out:
                return
            results = [outbox.get()]
            while not outbox.empty():
                results.append(outbox.get())
            out -= len(results)
            found: list[tuple[A, B]] = []
            failed: Exception | None = None
            for job, result in results:
                if isinstance(result, Exception):
                    failed = failed or result
                else:
                    found.append((job, result))
            if found:
                yield found
            if failed is not None:
                raise failed
    finally:
        for _ in range(threads):
            inbox.put(None)
