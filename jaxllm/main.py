"""The one entry: `python -m jaxllm.main --config=configs/STAGE.py[:PRESET] --workdir=DIR`.

Any field is overridden by `--config.path.to.field=value`. Several processes run one command with
`--coordinator=HOST:PORT --processes=N --process=I` in each, or `--processes=auto`, or started by
SLURM or Kubernetes. Exit codes: 0 done; 2 the user's mistake, told in one line; 75 stopped by a
signal after saving, or another process is lost, to be run again; 141 nobody reads the output any
more, as where it goes to `head`; 1 anything else, with a traceback.
"""

import contextlib
import errno
import importlib
import io
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxllm import command_line
from jaxllm import config as configuration
from jaxllm.errors import Preempted, UserError, unanswered
from jaxllm.preemption import end_on_signals, ended_by
from jaxllm.supervisor import ProcessGroup, Supervisor, process_group, supervise

STAGES = {
    "tokenizer": ("jaxllm.stages.tokenizer", "TrainTokenizerConfig"),
    "prepare": ("jaxllm.stages.prepare", "PrepareConfig"),
    "pretrain": ("jaxllm.stages.pretrain", "PretrainConfig"),
    "sft": ("jaxllm.stages.sft", "SftConfig"),
    "classify": ("jaxllm.stages.classify", "ClassifyConfig"),
    "reward": ("jaxllm.stages.reward", "RewardConfig"),
    "dpo": ("jaxllm.stages.dpo", "DpoConfig"),
    "grpo": ("jaxllm.stages.grpo", "GrpoConfig"),
    "ppo": ("jaxllm.stages.ppo", "PpoConfig"),
    "distill": ("jaxllm.stages.distill", "DistillConfig"),
    "score": ("jaxllm.stages.score", "ScoreConfig"),
    "generate_data": ("jaxllm.stages.generate_data", "GenerateDataConfig"),
    "generate": ("jaxllm.stages.generate", "GenerateConfig"),
    "chat": ("jaxllm.stages.chat", "ChatConfig"),
    "evaluate": ("jaxllm.stages.evaluate", "EvaluateConfig"),
    "scaling": ("jaxllm.stages.scaling", "ScalingConfig"),
    "import_hf": ("jaxllm.stages.import_hf", "ImportConfig"),
    "export_hf": ("jaxllm.stages.export_hf", "ExportConfig"),
}
"""Each stage's module, with its `run(config, workdir)`, and the dataclass of its configuration."""
RECIPE = "recipe"
"""The stage that runs others, whose configurations it holds."""

_MADE_BY_ONE = ("tokenizer", "prepare")
"""Stages whose work one process does, while the others wait."""
_SINGLE = ("generate_data", "chat", "score", "scaling", "import_hf", "export_hf")
"""Stages that have to be run as a single process."""

# What only the user can mend: a place that cannot be read or written.
_USERS_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
# How errors read that a lost peer causes in the others.
_COMMUNICATION = re.compile("Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|INTERNAL|CANCELLED")
_UNREAD = 128 + 13  # as shells tell that SIGPIPE ended a program


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code; unexpected errors pass through.

    As one of several processes it does not return in the process that does the work.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nStages: {', '.join(STAGES)}. Fields: docs/configuration.md.")
        return 0
    try:
        group, arguments = process_group(arguments, os.environ)
    except UserError as error:
        _tell(str(error))
        return error.exit_code
    if group is None:
        return _outcome(lambda: run(*command_line.parse(arguments)), _tell)
    supervisor = supervise()
    if isinstance(supervisor, int):
        return supervisor
    return _work_in_group(arguments, group, supervisor)


def _work_in_group(arguments: Sequence[str], group: ProcessGroup, supervisor: Supervisor) -> int:
    """Runs the command as one of several processes; returns only if it has not joined them."""
    from jaxllm.sharding.processes import Membership, is_main, say

    membership = Membership(supervisor)

    def join_and_run() -> None:
        config, workdir = command_line.parse(arguments)
        stage = config.get("stage")
        if stage in _SINGLE:
            raise UserError(f"the stage {stage} runs as a single process; start only one.")
        membership.join(group)
        if stage in _MADE_BY_ONE and not is_main():
            return
        try:
            run(config, workdir)
        except Preempted as stopped:
            if not stopped.together:
                raise
            if is_main():
                say(str(stopped))
            membership.leave(stopped.exit_code)

    try:
        code = _outcome(join_and_run, say)
    except Exception as error:
        if not membership.joined:
            raise
        if _COMMUNICATION.search(str(error)):
            membership.find_lost()
        traceback.print_exc(file=sys.__stderr__)
        code = 1
    if not membership.joined:
        return code
    return membership.fail(code) if code else membership.leave(0)


def _outcome(work: Callable[[], None], tell: Callable[[str], None]) -> int:
    """The exit code of `work`; unexpected errors pass through."""
    stop = end_on_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a text may have what its encoding has not
        sys.stdout.reconfigure(errors="replace")
    try:
        with ended_by(stop):
            work()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        return _UNREAD
    except (UserError, Preempted) as error:
        tell(str(error))
        return error.exit_code
    except OSError as error:
        full = error.errno == errno.ENOSPC
        passing = full or unanswered(error)
        if not error.filename or not (passing or error.errno in _USERS_ERRNOS):
            raise
        if passing:
            room = "make room, and " if full else ""
            tell(f"{error.filename}: {error.strerror}; {room}run the same command again")
            return Preempted.exit_code
        tell(f"{error.filename}: {error.strerror}")
        return UserError.exit_code
    return 0


def _tell(text: str) -> None:
    print(f"jaxllm: {text}", file=sys.stderr)


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
    if config.get("stage", "") == RECIPE:
        recipe = importlib.import_module("jaxllm.stages.recipe")
        recipe.run(config.to_dict(), workdir, _part)
        return
    _made("", config)(workdir)


def _made(path: str, config: Any) -> Callable[[Path | None], None]:
    """What runs a stage in a work directory; its configuration, which stands at `path`, is checked.

    Raises:
        UserError: the configuration is wrong.
    """
    stage = config.get("stage", "")
    if stage not in STAGES:
        where = f"config.{path}.stage" if path else "config.stage"
        known = (*STAGES, *(() if path else (RECIPE,)))
        raise UserError(f"{where}: {stage!r} is unknown; stages are {', '.join(known)}.")
    module_name, config_name = STAGES[stage]
    # Imported here, so that only the stage's own libraries are loaded.
    module = importlib.import_module(module_name)
    made = configuration.from_dict(getattr(module, config_name), config, path)
    return lambda workdir: module.run(made, workdir)


def _part(path: str, config: Any) -> Callable[[Path | None], None]:
    """As `_made`, for a stage that others follow in the same processes.

    Raises:
        UserError: as `_made`, or there are several processes and the stage has to be run by one.
    """
    from jaxllm.sharding.processes import is_main, main_first, several

    work, stage = _made(path, config), config["stage"]
    if stage in _SINGLE and several():
        raise UserError(f"config.{path}: the stage {stage} runs as a single process; start one.")
    if stage not in _MADE_BY_ONE:
        return work

    def by_one(workdir: Path | None) -> None:
        with main_first():
            if is_main():
                work(workdir)

    return by_one


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
