"""Checkpoints of a run, by Orbax: asynchronous, kept by count and by best, robust when broken.

`checkpoints/STEP/` holds two items: `params` (all parameters; of an adapter those beside its base)
and `progress` (the rest of the train state). A later stage reads `params` alone.
"""

import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxllm.checkpoints import orbax_output
from jaxllm.checkpoints.checksums import damage, write_checksums
from jaxllm.errors import Preempted, UserError, unanswered
from jaxllm.sharding.processes import (
    HEARTBEAT_SECONDS,
    from_main,
    gathered,
    is_main,
    main_first,
    several,
    warn,
)

orbax_output.quieten()

_WAITS = (5, 10, 20, 40, 80)
"""Seconds before what has failed is tried again."""
_STOP_WAITS = _WAITS[:2]
"""The same for the save of a run that is asked to stop, which is killed if it takes long."""
_COMMIT_SECONDS = 3600
"""How long the writing of a checkpoint may take, by this process and by the others."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which stay."""

    every: int = 500
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2
    """How many of the newest stay; the one with the lowest evaluation loss stays as well."""
    check_replicas: bool = False
    """Whether to compare, before each save, the copies of parameters on different devices bit for
    bit; the run ends with exit code 75 where they differ, to go on from the checkpoint before."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError("every, keep: must be at least 1")


class _SummedHandler(ocp.CompositeCheckpointHandler):
    """Writes the checksums of a checkpoint before it is committed, beside the training, so that
    there is none without them."""

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        write_checksums(Path(directory))


@ocp.args.register_with_handler(_SummedHandler, for_save=True, for_restore=True)
class _Items(ocp.args.Composite):
    """The items of a checkpoint by name; Orbax knows by its class which handler is meant."""


class Checkpointer:
    """Saves and restores the checkpoints under one directory.

    A failed save (a full disk, a store that does not answer) is a warning: the last good
    checkpoint stays, and the save is due again after some seconds, each time twice as many. One of
    several processes, which cannot know how the others fared, raises `Preempted` instead: the run
    is to be started again. A checkpoint that is damaged is set aside, and the one before it is
    used; several processes judge it together. A store that does not answer is asked again for a
    while; then `Preempted` is raised.

    Of several processes each calls the same methods in the same order.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        *,
        read_only: bool = False,
        warn: Callable[[str], None] = warn,
    ) -> None:
        """Opens `directory`, and makes it unless `read_only`, which writes and removes nothing."""
        self._directory = directory.resolve()
        self._keep = keep
        self._read_only = read_only
        self._warn = warn
        self._saving: int | None = None
        self._best: tuple[int, ...] = ()
        self._failures = 0
        self._retry_at = math.inf
        self._next_poll = -math.inf
        if not read_only and is_main():
            self._patiently(str(self._directory), self._prepare)
        # Not Orbax's manager, which finds, names and deletes checkpoints too: of several processes
        # its own would have to wait for one another for each of that, and one whose write has
        # failed waits for the others before it says so. All processes are named, since else they
        # would meet by a collective of the devices.
        everyone = ocp.options.MultiprocessingOptions(
            active_processes=set(range(jax.process_count())) if several() else None
        )
        items = ocp.CompositeOptions(multiprocessing_options=everyone)
        self._orbax = ocp.AsyncCheckpointer(
            _SummedHandler(composite_options=items),
            timeout_secs=_COMMIT_SECONDS,
            multiprocessing_options=everyone,
        )

    def _prepare(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        for half_written in self._directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(half_written, ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps with a committed checkpoint, oldest first."""
        committed = functools.partial(committed_steps, self._directory)
        return from_main(lambda: self._patiently(str(self._directory), committed))

    def save(self, step: int, params: Any, progress: Any) -> None:
        """Starts a save and returns; the arrays may be donated right after.

        A save that is still under way is waited for first; a step already saved is left alone.
        """
        self.wait()
        self._retry_at = math.inf
        with self._surviving(step):
            if step in from_main(lambda: committed_steps(self._directory)):
                return
            self._saving = step
            self._orbax.save(
                self._directory / str(step),
                args=_Items(
                    params=ocp.args.StandardSave(params),
                    progress=ocp.args.StandardSave(progress),
                ),
            )

    def wait(self) -> None:
        """Waits until the save under way is committed, then drops what need not stay."""
        step = self._saving
        if step is None:
            return
        committed = False
        with self._surviving(step):
            self._orbax.wait_until_finished()
            committed = True
        if committed:
            self._saving, self._failures = None, 0
            self._drop_old()

    def poll(self) -> None:
        """Looks how the save under way fares, without waiting for it; to be called often.

        Raises:
            Preempted: it has failed, in one of several processes.
        """
        if self._saving is None:
            return
        with self._surviving(self._saving):
            self._orbax.check_for_errors()
        # Asked once a second, not after each step: a store may take long to answer.
        if self._saving is not None and time.monotonic() >= self._next_poll:
            self._next_poll = time.monotonic() + 1
            committed = False
            with suppress(OSError):  # or not answer at all
                committed = (self._directory / str(self._saving)).exists()
            if committed:
                self.wait()

    @property
    def retry_due(self) -> bool:
        """Whether a save has failed, and it is time to save what there is now."""
        return time.monotonic() >= self._retry_at

    def finish(self, step: int, save: Callable[[], None], *, stopping: bool = False) -> bool:
        """Waits until there is a checkpoint of the last step; `save` is called again if it failed.

        Returns:
            Whether there is; a run that is `stopping` tries for seconds, another for minutes.
        """
        self.wait()
        for seconds in _STOP_WAITS if stopping else _WAITS:
            if self._is_saved(step):
                return True
            time.sleep(seconds)
            save()
            self.wait()
        return self._is_saved(step)

    def _is_saved(self, step: int) -> bool:
        """Whether there is a checkpoint of a step, as far as the store says."""

        def found() -> bool:
            with suppress(OSError):
                return step in committed_steps(self._directory)
            return False

        return from_main(found)

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
        args = _Items(
            params=ocp.args.StandardRestore(params),
            progress=ocp.args.StandardRestore(progress),
        )
        found = self._newest_readable(args)
        if found is None:
            return None
        step, items = found
        return step, items["params"], items["progress"]

    def restore_params(
        self, params: Any, branch: str = "", has_others: bool = False
    ) -> tuple[int, Any] | None:
        """The parameters alone of the newest checkpoint that can be read, or None.

        Args:
            params: their shapes and layouts.
            branch: where they stand; empty: at the root.
            has_others: whether others stand beside them, which are left alone; else a checkpoint
                that has more cannot be read for them.
        """
        wanted = {branch: params} if branch else params
        args: Any = ocp.args.StandardRestore(wanted)
        if has_others:
            layouts = ocp.checkpoint_utils.construct_restore_args(wanted)
            args = ocp.args.PyTreeRestore(wanted, layouts, partial_restore=True)
        found = self._newest_readable(_Items(params=args))
        if found is None:
            return None
        restored = found[1]["params"]
        return found[0], restored[branch] if branch else restored

    def _newest_readable(self, args: Any) -> tuple[int, Any] | None:
        steps, broken = self.steps(), []
        for step in reversed(steps):
            name, folder = f"checkpoint {step}", self._directory / str(step)
            look = functools.partial(damage, folder, *self._part)
            what = _first(gathered(self._patiently(name, look)))
            if not what:
                items, failure = self._read(step, args)
                what = _first(self._judged_together(step, failure))
            if what:
                self._warn(f"{name} cannot be read ({what}); trying the one before")
                broken.append(step)
                continue
            if broken and not self._read_only:
                with main_first():
                    for each in broken if is_main() else ():
                        self._set_aside(each)
            return step, items
        if steps or any(self._directory.glob("broken-*")):
            raise UserError(
                f"{self._directory}: none of its checkpoints can be read for this model; "
                "restore one from a copy, or use another --workdir."
            )
        return None

    def _judged_together(self, step: int, failure: str) -> list[str]:
        """Why the processes could not read a checkpoint, each; empty for those that could.

        Raises:
            Preempted: the others do not say; they may wait for this one within Orbax. It is set
                aside then, if they are all alive, so that the next life uses the one before.
        """
        if not failure or not several():
            return gathered(failure)
        try:
            return gathered(failure, seconds=2 * HEARTBEAT_SECONDS)
        except TimeoutError:
            if not self._read_only:
                self._set_aside(step)
            raise Preempted(
                f"checkpoint {step} cannot be read by this process ({failure}); "
                "run the same command again to go on from the one before"
            ) from None

    def _read(self, step: int, args: Any) -> tuple[Any, str]:
        """The items of a checkpoint, or why they cannot be read."""

        def read() -> Any:
            items = self._orbax.restore(self._directory / str(step), args=args)
            jax.block_until_ready(items["params"])
            return items

        try:
            # Several processes meet within it, and would not all come again.
            return self._patiently(f"checkpoint {step}", read, () if several() else _WAITS), ""
        except Exception as error:
            # Orbax and TensorStore raise errors of many kinds for a damaged file.
            return None, _reason(error)

    def _patiently(
        self, name: str, call: Callable[[], T], waits: Sequence[int | float] | None = None
    ) -> T:
        """What `call` gives; it is called again after each of `waits` seconds while the store of
        `name` does not answer.

        Raises:
            Preempted: it has not answered.
        """
        for seconds in (*(_WAITS if waits is None else waits), None):
            try:
                return call()
            except Exception as error:
                if not unanswered(error):
                    raise
                what = f"{name} cannot be read now ({_reason(error)})"
                if seconds is None:
                    raise Preempted(f"{what}; run the same command again") from None
                self._warn(f"{what}; trying again in {seconds} seconds")
            time.sleep(seconds)
        raise AssertionError("the last try has returned")

    def close(self) -> None:
        """Waits for the save under way and ends Orbax's threads.

        One of several processes that has failed in the middle of a save does not wait: the others
        would wait for it as long.
        """
        if self._saving is not None and several():
            return
        self.wait()
        self._orbax.close()

    @contextmanager
    def _surviving(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Asynchronous saves surface whatever went wrong in the writer's thread.
            if several():
                raise Preempted(
                    f"checkpoint {step} could not be written ({_reason(error)}); "
                    "run the same command again to go on from the one before"
                ) from None
            seconds = _WAITS[min(self._failures, len(_WAITS) - 1)]
            self._warn(
                f"checkpoint {step} could not be written ({_reason(error)}); it is tried again "
                f"after {seconds} seconds"
            )
            self._saving, self._failures = None, self._failures + 1
            self._retry_at = time.monotonic() + seconds
            with suppress(OSError):  # the store may not answer
                for path in self._directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                    shutil.rmtree(path, ignore_errors=True)

    @property
    def _part(self) -> tuple[int, int]:
        """Which part of a checkpoint's files this process checks, of how many."""
        return jax.process_index(), jax.process_count()

    def _drop_old(self) -> None:
        if not is_main():
            return
        try:
            steps = committed_steps(self._directory)
            best = next((step for step in self._best if step in steps), None)
            for step in set(steps[: -self._keep]) - {best}:
                # Renamed first: what is half removed is no checkpoint, and the next life clears
                # it away.
                dropped = self._directory / f"{step}.orbax-checkpoint-tmp-dropped"
                (self._directory / str(step)).rename(dropped)
                shutil.rmtree(dropped, ignore_errors=True)
        except OSError as error:
            self._warn(f"an old checkpoint could not be removed ({_reason(error)})")

    def _set_aside(self, step: int) -> None:
        """Renames a broken checkpoint, so that its step can be saved again and nothing is lost."""
        names = (f"broken-{step}", *(f"broken-{step}-{number}" for number in range(2, 100)))
        free = next(name for name in names if not (self._directory / name).exists())
        with suppress(FileNotFoundError):  # another process was first
            (self._directory / str(step)).rename(self._directory / free)


def committed_steps(directory: Path) -> list[int]:
    """The steps with a committed checkpoint under `directory`, oldest first.

    Raises:
        OSError: the store does not answer.
    """
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def _first(failures: Sequence[str]) -> str:
    """The first that there is, with the number of its process if there are several."""
    for index, failure in enumerate(failures):
        if failure:
            return f"process {index}: {failure}" if len(failures) > 1 else failure
    return ""


def _reason(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
