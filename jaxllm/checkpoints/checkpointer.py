"""Checkpoints of a run, by Orbax: asynchronous, kept by count and by best, robust when broken.

`checkpoints/STEP/` holds two items: `params` (all parameters) and `progress` (the rest of the
train state). A later stage reads `params` alone.
"""

import dataclasses
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxllm.errors import UserError

# What Orbax logs of each save would drown the progress line, and what it logs of a failed one our
# warning, which says the same in a line; it shares absl's logger with others.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which stay."""

    every: int = 500
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2
    """How many of the newest stay; the one with the lowest evaluation loss stays as well."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError("every, keep: must be at least 1")


def warn_on_stderr(message: str) -> None:
    """Prints a warning where it does not mix with results."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


class Checkpointer:
    """Saves and restores the checkpoints under one directory.

    A failed save (a full disk) is a warning: training goes on, and the last good checkpoint
    stays. A checkpoint that cannot be read is set aside, and the one before it is used.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        *,
        read_only: bool = False,
        warn: Callable[[str], None] = warn_on_stderr,
    ) -> None:
        """Opens `directory`, and makes it unless `read_only`, which writes and removes nothing."""
        self._directory = directory.resolve()
        self._keep = keep
        self._read_only = read_only
        self._warn = warn
        self._saving: int | None = None
        self._best: tuple[int, ...] = ()
        self._open()

    def _open(self) -> None:
        # Deleting is done here, after a newer save is known to be whole, so that a crash at any
        # moment leaves a good checkpoint.
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_names=("params", "progress"),
            options=ocp.CheckpointManagerOptions(
                create=not self._read_only,
                cleanup_tmp_directories=not self._read_only,
                read_only=self._read_only,
            ),
        )

    def steps(self) -> list[int]:
        """The steps with a committed checkpoint, oldest first."""
        return sorted(self._manager.all_steps(read=True))

    def save(self, step: int, params: Any, progress: Any) -> None:
        """Starts a save and returns; the arrays may be donated right after.

        A save that is still under way is waited for first; a step already saved is left alone.
        """
        self.wait()
        if step in self.steps():
            return
        with self._surviving(step):
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    progress=ocp.args.StandardSave(progress),
                ),
                force=True,
            )

    def wait(self) -> None:
        """Waits until the save under way is committed, then drops what need not stay."""
        if self._saving is None:
            return
        with self._surviving(self._saving):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            self._drop_old()
        self._saving = None

    def mark_best(self, *steps: int) -> None:
        """Keeps the first of `steps` that has a checkpoint, until others are marked."""
        self._best = steps

    def restore(self, params: Any, progress: Any) -> tuple[int, Any, Any] | None:
        """The newest checkpoint that can be read, or None when there is none.

        Args:
            params, progress: trees of `jax.ShapeDtypeStruct` with shardings, which may be of
                another mesh than the one that saved.

        Returns:
            step, params, progress.
        """
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            progress=ocp.args.StandardRestore(progress),
        )
        found = self._newest_readable(args)
        if found is None:
            return None
        step, items = found
        return step, items["params"], items["progress"]

    def restore_params(self, params: Any) -> tuple[int, Any] | None:
        """The parameters alone of the newest checkpoint that can be read, or None."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(params))
        found = self._newest_readable(args)
        return None if found is None else (found[0], found[1]["params"])

    def _newest_readable(self, args: Any) -> tuple[int, Any] | None:
        steps = self.steps()
        failures = []
        for step in reversed(steps):
            try:
                items = self._manager.restore(step, args=args)
                jax.block_until_ready(items["params"])
            except Exception as error:
                # Orbax and TensorStore raise errors of many kinds for a damaged file.
                reason = str(error).strip().splitlines()[0][:200] if str(error) else repr(error)
                self._warn(f"checkpoint {step} cannot be read ({reason}); trying the one before")
                failures.append(step)
                continue
            for broken in () if self._read_only else failures:
                self._set_aside(broken)
            return step, items
        if steps:
            raise UserError(
                f"{self._directory}: none of the checkpoints {steps} can be read for this model; "
                "restore one from a copy, or use another --workdir."
            )
        return None

    def close(self) -> None:
        """Waits for the save under way and ends Orbax's threads."""
        self.wait()
        self._manager.close()

    @contextmanager
    def _surviving(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Asynchronous saves surface whatever went wrong in the writer's thread.
            reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
            self._warn(f"checkpoint {step} could not be written ({reason}); training goes on")
            self._saving = None
            self._remove_partial(step)
            self._open()

    def _remove_partial(self, step: int) -> None:
        for path in self._directory.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def _drop_old(self) -> None:
        steps = self.steps()
        best = next((step for step in self._best if step in steps), None)
        for step in set(steps[: -self._keep]) - {best}:
            self._manager.delete(step)

    def _set_aside(self, step: int) -> None:
        """Renames a broken checkpoint, so that its step can be saved again and nothing is lost."""
        names = (f"broken-{step}", *(f"broken-{step}-{number}" for number in range(2, 100)))
        free = next(name for name in names if not (self._directory / name).exists())
        (self._directory / str(step)).rename(self._directory / free)
        self._manager.reload()
