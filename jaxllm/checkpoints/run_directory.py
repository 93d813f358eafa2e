"""A run directory: self-describing, so that a later stage needs nothing but its path.

`config.json` holds the resolved configuration and the versions of the libraries; the other
files of the layout (docs/formats.md) are written by the rooms that own them.
"""

import errno
import importlib.metadata
import json
import math
import platform
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxllm import config as configuration
from jaxllm.errors import UserError
from jaxllm.files import write_json

# Groups and fields that a resumed run may change: they steer the run, not what it computes.
FREE_ON_RESUME = ("steps", "log", "eval", "checkpoint", "mesh", "compare")
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


class RunDirectory:
    """The paths of a run directory, and its configuration."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def base(self) -> Path:
        return self.path / "base.json"

    @property
    def labels(self) -> Path:
        return self.path / "labels.json"

    @property
    def classes(self) -> Path:
        return self.path / "classes.json"

    @property
    def rewards(self) -> Path:
        return self.path / "rewards.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.md"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def goodput(self) -> Path:
        return self.path / "goodput.json"

    @property
    def items(self) -> Path:
        return self.path / "items.jsonl"

    @property
    def answers(self) -> Path:
        return self.path / "answers.jsonl"

    @property
    def answer_rewards(self) -> Path:
        return self.path / "answer_rewards.jsonl"

    @property
    def answered(self) -> Path:
        return self.path / "data.jsonl"

    @property
    def scaling(self) -> Path:
        return self.path / "scaling.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def open(
        self,
        config: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        free: Collection[str] = (),
    ) -> None:
        """Makes the directory; in one that holds a run, checks that the configuration agrees, and
        in any other, that nobody's files would be written over.

        Args:
            config: the resolved configuration.
            defaults: the stage's own. A field that there was not yet when the run was recorded
                counts as its default.
            free: paths of fields that may differ, beside `FREE_ON_RESUME`.

        Raises:
            UserError: the directory is of a run with another configuration (the difference is
                shown), or of none and holds what a run writes once it has begun; or something else
                stands there.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--workdir={self.path}: is a file; give a directory.")
        if self.config_path.exists():
            self._check_unchanged(config, defaults or {}, free)
        elif self.path.exists():
            self._check_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None

    def begin(self, config: Mapping[str, Any], data: Mapping[str, str] | None = None) -> None:
        """Writes `config.json`, after `open`: from here on the directory belongs to this run.

        `data` are fingerprints of what the run reads, to be found again when it is resumed.

        To be called once the data is found good, so that a mistake there can be mended without
        another directory.
        """
        try:
            recorded = {"config": config, "data": dict(data or {}), "versions": versions()}
            write_json(self.config_path, recorded)
        except OSError as error:
            raise self._unwritable(error) from None

    def config(self) -> dict[str, Any]:
        """The resolved configuration of the run.

        Raises:
            UserError: this is no run directory.
        """
        return self._recorded("config")

    def group(self, name: str) -> dict[str, Any]:
        """A group of fields of that configuration, `model` say.

        Raises:
            UserError: this is no run directory, or that of a stage without such a group.
        """
        config = self.config()
        if not isinstance(config.get(name), dict):
            raise UserError(
                f"{self.path}: is of the stage {config.get('stage')!r}, which trains no model; "
                "give the --workdir of a run of pretrain."
            )
        return config[name]

    def data(self) -> dict[str, str]:
        """The fingerprints of what the run reads, as `begin` recorded them; else empty."""
        return self._recorded("data") if self.config_path.exists() else {}

    def _recorded(self, name: str) -> dict[str, Any]:
        if not self.config_path.exists():
            raise UserError(
                f"{self.path}: is no run directory (it has no config.json); "
                "give the --workdir of an earlier run."
            )
        return recorded(self.config_path, name)

    def write_summary(self, scores: Mapping[str, float]) -> None:
        """Writes `summary.json`: final scores by flat name; one that is not finite is null."""
        finite = {name: s if math.isfinite(s) else None for name, s in scores.items()}
        write_json(self.summary, finite)

    def final_scores(self) -> dict[str, Any]:
        """What `summary.json` holds; empty where it cannot be read."""
        try:
            return json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _unwritable(self, error: OSError) -> UserError | OSError:
        if error.errno == errno.ENOSPC:
            return error
        return UserError(f"--workdir={self.path}: cannot be written ({error.strerror}).")

    def _check_free(self) -> None:
        """What stands here before `begin` may be left by a run that was cut off while it prepared
        its data or tokenizer; files that are written after it are not."""
        files = (self.metrics, self.samples, self.summary, self.items, self.classes, self.report)
        taken = [path.name for path in files if path.exists()]
        # Those of answers are there, and empty, before the first of them has come.
        taken += [p.name for p in (self.answers, self.answered) if p.exists() and p.stat().st_size]
        if self.checkpoints.is_dir() and any(self.checkpoints.iterdir()):
            taken.append(f"{self.checkpoints.name}/")
        if taken:
            raise UserError(
                f"--workdir={self.path}: has {', '.join(taken)} and no config.json, so it holds no "
                "run, and this one would write over what is there; give another --workdir."
            )

    def _check_unchanged(
        self, config: Mapping[str, Any], defaults: Mapping[str, Any], free: Collection[str]
    ) -> None:
        recorded, now = configuration.flatten(self.config()), configuration.flatten(config)
        before = configuration.flatten(defaults) | recorded
        changes = [
            f"config.{path}: was {before.get(path)!r}, now {now.get(path)!r}"
            for path in {**before, **now}
            if before.get(path) != now.get(path)
            and path.split(".")[0] not in FREE_ON_RESUME
            and path not in free
        ]
        if changes:
            raise UserError(
                f"--workdir={self.path} holds a run of another configuration "
                f"({'; '.join(changes)}); give another --workdir, or the same configuration."
            )


def recorded(path: Path, name: str) -> dict[str, Any]:
    """What a `config.json` holds by a name: `config`, `data` or `versions`.

    Raises:
        UserError: it cannot be read, or holds no such object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[name]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: cannot be read (its {name} is no object).")
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    found = {"python": platform.python_version(), "jaxllm": _version("jaxllm")}
    return found | {name: _version(name) for name in _LIBRARIES}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
