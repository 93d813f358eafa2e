"""A model that a run needs beside the one it trains: the same one in each life of the run."""

import functools
from typing import Any

from jaxllm.checkpoints.base import (
    Role,
    check_base,
    parameter_checksums,
    place_of,
    record_base,
    recorded_checksums,
)
from jaxllm.checkpoints.load import load_model, model_config_of
from jaxllm.models.config import ModelConfig, bare
from jaxllm.sharding.processes import from_main, is_main
from jaxllm.stages.training_run import TrainingRun


class FrozenModel:
    """A model by where it is; its parameters are loaded when they are asked for."""

    def __init__(
        self, run: TrainingRun[Any], init: str, role: Role, wanted: ModelConfig | None = None
    ) -> None:
        """Args:
        run: that needs it.
        init: where it is, in the first life of the run.
        role: what it is to the run.
        wanted: its model, as it is to be loaded; None: as it was recorded or published.
        """
        self._run, self._init, self._role = run, init, role
        self.known = from_main((run.directory.path / role.file).exists)
        self._wanted = wanted

    @functools.cached_property
    def path(self) -> str:
        """Where it is now.

        Raises:
            UserError: it is not where it was.
        """
        return place_of(self._run.directory, self._init, self._role)

    @functools.cached_property
    def config(self) -> ModelConfig:
        """Its model, without what reads it, and its layers in the stacks of its family."""
        return bare(self._wanted or model_config_of(self.path))

    @functools.cached_property
    def checksums(self) -> dict[str, int]:
        """Of its parameters."""
        if self.known:
            return recorded_checksums(self._run.directory, self._role)
        return parameter_checksums(self.params)

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """Its parameters.

        Raises:
            UserError: they are not those that the run began with.
        """
        run = self._run
        params = load_model(self.path, run.mesh, self.config).params
        if self.known:
            check_base(run.directory, self.path, parameter_checksums(params), self._role)
        return params

    def given_up(self) -> dict[str, Any]:
        """Its parameters, which are not kept here any longer."""
        params = self.params
        del self.__dict__["params"]
        return params

    def record(self) -> None:
        """Writes which it is, in the first life."""
        if not self.known:
            checksums = self.checksums
            if is_main():
                record_base(self._run.directory, self._init, checksums, self._role)
