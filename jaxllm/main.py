"""The one entry: `python -m jaxllm.main --config=configs/STAGE.py[:PRESET] --workdir=DIR`.

Any field is overridden by `--config.path.to.field=value`. Exit codes: 0 done; 2 the user's
mistake, told in one line; 75 stopped by a signal after saving, to be run again; 141 nobody reads
the output any more, as where it goes to `head`; 1 anything else, with a traceback.
"""

import contextlib
import errno
import importlib
import io
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from jaxllm import command_line
from jaxllm import config as configuration
from jaxllm.errors import Preempted, UserError
from jaxllm.preemption import end_on_signals

STAGES = {
    "tokenizer": ("jaxllm.stages.tokenizer", "TrainTokenizerConfig"),
    "prepare": ("jaxllm.stages.prepare", "PrepareConfig"),
    "pretrain": ("jaxllm.stages.pretrain", "PretrainConfig"),
    "generate": ("jaxllm.stages.generate", "GenerateConfig"),
    "chat": ("jaxllm.stages.chat", "ChatConfig"),
    "evaluate": ("jaxllm.stages.evaluate", "EvaluateConfig"),
    "import_hf": ("jaxllm.stages.import_hf", "ImportConfig"),
    "export_hf": ("jaxllm.stages.export_hf", "ExportConfig"),
}
"""Each stage's module, with its `run(config, workdir)`, and the dataclass of its configuration."""

# What only the user can mend: a place that cannot be read or written, a full disk.
_USERS_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR)
_UNREAD = 128 + 13  # as shells tell that SIGPIPE ended a program


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code; unexpected errors pass through."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nStages: {', '.join(STAGES)}. Fields: docs/configuration.md.")
        return 0
    end_on_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a text may have what its encoding has not
        sys.stdout.reconfigure(errors="replace")
    try:
        run(*command_line.parse(arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        return _UNREAD
    except (UserError, Preempted) as error:
        print(f"jaxllm: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in _USERS_ERRNOS or not error.filename:
            raise
        print(f"jaxllm: {error.filename}: {error.strerror}", file=sys.stderr)
        return UserError.exit_code
    return 0


def _output_is_closed() -> bool:
    """Whether nobody reads standard output or errors; if so, no more is written to them."""
    closed = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(io.UnsupportedOperation):  # it is no file
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if poll.poll(0):  # an error, or hung up
                closed = True
                # What is left in the buffer is flushed when Python ends, which would complain.
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
    return closed


def run(config: ConfigDict, workdir: Path | None) -> None:
    """Runs the stage that `config.stage` names.

    Raises:
        UserError: the configuration or the data is wrong.
        Preempted: a signal came; what could be saved is saved.
    """
    stage = config.get("stage", "")
    if stage not in STAGES:
        raise UserError(f"config.stage: {stage!r} is unknown; stages are {', '.join(STAGES)}.")
    module_name, config_name = STAGES[stage]
    # Imported here, so that only the stage's own libraries are loaded.
    module = importlib.import_module(module_name)
    module.run(configuration.from_dict(getattr(module, config_name), config), workdir)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
