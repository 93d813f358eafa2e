"""The `chat` stage: a conversation with a model in the terminal, or one answer."""

import contextlib
import dataclasses
import io
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax

from jaxllm.errors import UserError
from jaxllm.inference.chat import Chat
from jaxllm.inference.requests import Request
from jaxllm.inference.trained import load_trained
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.stages.fields import SamplingFields
from jaxllm.tokenizers.chat_template import Message, chat_template

HELP = """\
/reset         begin anew, with the same system message
/system TEXT   begin anew, with TEXT as the system message (without TEXT: with none)
/save FILE     write the conversation as a line of JSON into a new file
/help          show this
/quit          end, as the end of input and Ctrl-C do; Ctrl-C in an answer ends the answer only
Anything else is sent, line by line; begin with a space to send a line that begins with /."""


@runtime_checkable
class Writer(Protocol):
    """What writes answers, such as a `TrainedModel`."""

    def stream(self, request: Request) -> Iterator[str]:
        """Pieces of the text that continues the request's prompt, as they are made."""
        ...


@dataclasses.dataclass(frozen=True)
class ChatConfig(SamplingFields):
    """A conversation with a trained model."""

    stage: str = "chat"
    """Always `chat`."""
    init: str = ""
    """Run directory or Hugging Face folder of the model."""
    prompt: str = ""
    """Message to answer, after which the program ends; empty: messages are read from the
    terminal, or line by line from standard input."""
    system: str = ""
    """System message; empty: none."""
    template: str = ""
    """How messages become text: `chatml`, `llama3`, or a file with a Jinja template; empty: the
    template that came with the tokenizer, else the built-in one whose special tokens it has."""
    seed: int = 0
    """Of the draws; the same messages get the same answers."""
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.system.encode()
        except UnicodeEncodeError:  # bytes of a command line that are not UTF-8
            raise ValueError("system: is not Unicode text") from None
        if self.prompt and not self.prompt.strip():  # in the terminal it is not sent either
            raise ValueError("prompt: holds nothing but blanks; write a message, or leave it out")


def run(config: ChatConfig, workdir: Path | None) -> None:
    """Answers `config.prompt`, or what is typed until it ends."""
    if not config.init:
        raise UserError("config.init: give the run directory of a trained model.")
    if workdir is not None:
        raise UserError(f"--workdir={workdir}: a chat writes nothing there; leave it out.")
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        trained = load_trained(config.init, mesh)
        template = chat_template(trained.loaded.tokenizer, config.template)
        chat = Chat(template, trained.loaded.context, config.sampling(), config.seed)
        if config.prompt:
            asked = chat.ask([*_opening(config.system), _message("user", config.prompt)])
            for piece in trained.stream(asked.request):
                print(piece, end="", flush=True)
            print()
        else:
            converse(trained, chat, config.system)


def converse(model: Writer, chat: Chat, system: str) -> None:
    """Reads lines from standard input and answers each, until they end.

    A mistake is told in one line on standard error, and the conversation goes on as it was.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are no text come in, to be told
        encoding = None if sys.stdin.isatty() else "utf-8"
        sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # where it is there, lines can be edited
            import readline  # noqa: F401
        print("A message to begin, /help for help, /quit to end.", file=sys.stderr)
    messages = _opening(system)
    told = False
    with _interrupts():
        while (line := _next_line()) is not None:
            try:
                line.encode()
            except UnicodeEncodeError:
                _tell("the line is not UTF-8 text, and was not sent")
                continue
            try:
                if line.startswith("/"):
                    messages = _command(line, messages)
                elif line.strip():
                    asked = chat.ask([*messages, _message("user", line)])
                    if asked.left_out and not told:
                        told = True
                        _tell(
                            "the conversation no longer fits into the "
                            f"{chat.context} tokens that the model can see; from here on its "
                            "oldest turns are left out"
                        )
                    answer = _print_answer(model.stream(asked.request))
                    turn = [_message("user", line), _message("assistant", answer)]
                    messages = [*messages, *(turn if answer else [])]
            except UserError as error:
                _tell(str(error))


def _command(line: str, messages: Sequence[Message]) -> list[Message]:
    """Does what a line that begins with `/` says, and gives the conversation as it is then."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    system = [message for message in messages if message["role"] == "system"]
    if name in ("/reset", "/quit") and argument:
        raise UserError(f"{name}: takes nothing after it.")
    if name == "/reset":
        return system
    if name == "/system":
        return _opening(argument)
    if name == "/save":
        _save(argument, messages)
    elif name == "/help":
        print(HELP, file=sys.stderr)
    else:
        raise UserError(f"{name}: no such command; /help shows those there are.")
    return list(messages)


def _save(name: str, messages: Sequence[Message]) -> None:
    """Writes the conversation as a record of messages, never over what is there.

    Raises:
        UserError: no file is named, there is nothing to save, or it cannot be written there.
    """
    if not name:
        raise UserError("/save: name a file after it.")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("/save: there is no answer yet.")
    try:
        with Path(name).expanduser().open("x", encoding="utf-8") as file:
            file.write(json.dumps({"messages": list(messages)}, ensure_ascii=False) + "\n")
    except FileExistsError:
        raise UserError(f"/save: {name} is there already; name a new file.") from None
    except (OSError, RuntimeError, ValueError) as error:  # no such home; a name that is none
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"/save: {name}: {reason}; name another file.") from None


def _print_answer(pieces: Iterator[str]) -> str:
    """Prints an answer while it is written; Ctrl-C ends it where it is."""
    answer = ""
    try:
        for piece in pieces:
            answer += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print(flush=True)
    return answer


def _next_line() -> str | None:
    """The next line; None at the end of input, at Ctrl-C, and for `/quit`."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            print()
        return None
    return None if line.rstrip() == "/quit" else line


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Inside, Ctrl-C is a `KeyboardInterrupt`, which ends an answer or else what is inside."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGINT, before)


def _opening(system: str) -> list[Message]:
    return [_message("system", system)] if system else []


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _tell(text: str) -> None:
    print(f"jaxllm: {text}", file=sys.stderr)
