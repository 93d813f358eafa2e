"""Where a run's scalars go: `metrics.jsonl`, TensorBoard, and Weights & Biases by option."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.errors import UserError
from jaxllm.reporting.event_file import EventFile
from jaxllm.reporting.metrics_file import MetricsFile, read_metrics
from jaxllm.sharding.processes import is_main


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is recorded, and how often."""

    every: int = 10
    """Steps between log points."""
    wandb: str = ""
    """Weights & Biases project to send scalars to; empty: none. Needs the extra `[wandb]`."""
    peak_tflops: float = 0.0
    """Peak of one device in TFLOP/s, for MFU; 0: as known for the device."""
    watchdog: float = 600.0
    """Seconds without a finished step, evaluation or save after which standard error is told what
    is waited for, with the stack traces of all threads; 0: never."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError("every: must be at least 1")
        for name in ("peak_tflops", "watchdog"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative")


class Recorder:
    """Writes the scalars of a run, from step `start` on; what was recorded after it is dropped.

    Nothing here can end a run: a full disk costs log lines, with a warning. Of several processes
    only the first records anything.
    """

    def __init__(
        self, run: RunDirectory, start: int, config: LogConfig, run_config: Mapping[str, Any]
    ) -> None:
        self._path = run.metrics
        self._file = self._tensorboard = self._wandb = None
        if not is_main():
            return
        self._file = MetricsFile(run.metrics)
        self._file.truncate_after(start)
        self._tensorboard = EventFile(run.tensorboard, start + 1)
        self._wandb = _start_wandb(config.wandb, run, run_config) if config.wandb else None

    def record(self, step: int, seconds: float, scalars: Mapping[str, float]) -> None:
        """Records scalars by name at `step`; `seconds` since the run (in this life) began."""
        if self._file is not None:
            self._file.append(step, seconds, scalars)
        if self._tensorboard is not None:
            self._tensorboard.write(step, scalars)
        if self._wandb is not None:
            self._wandb.log(dict(scalars), step=step)

    def flush(self) -> None:
        """Writes the lines of `metrics.jsonl` that wait for room on the disk.

        To be called before each checkpoint: a run that goes on from it finds room for neither, or
        has lines up to its step.
        """
        if self._file is not None:
            self._file.flush()

    def history(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl` so far."""
        return read_metrics(self._path)

    def close(self) -> None:
        """Flushes and ends the writers."""
        self.flush()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(project: str, run: RunDirectory, run_config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            "config.log.wandb: Weights & Biases is not installed; pip install 'jaxllm[wandb]'."
        ) from None
    path = run.path.resolve()
    # Of the whole path: a resumed run continues its curves, and runs of one name stay apart.
    identity = hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()
    return wandb.init(
        project=project,
        name=path.name,
        id=identity,
        resume="allow",
        dir=run.path,
        config=dict(run_config),
    )
