"""The reference that a run holds its policy to: found again in each life, beside the policy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm import trees
from jaxllm.checkpoints.base import (
    REFERENCE,
    base_path,
    check_base,
    parameter_checksums,
    record_base,
    recorded_checksums,
)
from jaxllm.checkpoints.load import load_model
from jaxllm.models.config import bare
from jaxllm.models.lora import PAIRS
from jaxllm.objectives.objective import Params
from jaxllm.sharding.processes import from_main, is_main
from jaxllm.stages.training_run import TrainingRun

REFERENCE_TREE = "reference"
"""Where its parameters stand, if they are held beside the policy's."""
NOT_THE_REFERENCE = f"(?!{REFERENCE_TREE}/)"
"""Begins the pattern of other parameters."""


class Origin:
    """The model that a run begins from and is held to: the same one in each life of the run."""

    def __init__(self, run: TrainingRun[Any], init: str) -> None:
        """`init`: where it is, in the first life of the run."""
        self._run, self._init = run, init
        self.known = from_main((run.directory.path / REFERENCE.file).exists)

    @functools.cached_property
    def checksums(self) -> dict[str, int]:
        """Of its parameters."""
        if self.known:
            return recorded_checksums(self._run.directory, REFERENCE)
        return parameter_checksums(self.params)

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """Its parameters, as the policy stands on them.

        Raises:
            UserError: they are not those that the run began with.
        """
        run, directory = self._run, self._run.directory
        init = str(base_path(directory, REFERENCE)) if self.known else self._init
        params = load_model(init, run.mesh, bare(run.config.model)).params
        if self.known:
            check_base(directory, init, parameter_checksums(params), REFERENCE)
        return params

    def given_up(self, dtype: str) -> dict[str, Any]:
        """Its parameters in a dtype; they are not kept here any longer."""
        params = self.params
        del self.__dict__["params"]
        return jax.tree.map(lambda x: x.astype(dtype), params)

    def record(self) -> None:
        """Writes which it is, in the first life."""
        if not self.known:
            checksums = self.checksums
            if is_main():
                directory = self._run.directory
                record_base(directory, self._init, checksums, REFERENCE)


def without_pairs(params: Params) -> Params:
    """The parameters of a reference that is the policy's base, without the pairs."""
    return trees.divide(params, PAIRS)[1]


def beside(params: Params) -> Params:
    """Those of one that is held beside the policy."""
    return params[REFERENCE_TREE]


def with_reference(params: dict[str, Any]) -> dict[str, Any]:
    """The policy's parameters with a copy of them: what is trained is donated."""
    return {**params, REFERENCE_TREE: jax.tree.map(jnp.copy, params)}


def policy_of(params: Params) -> Params:
    """All parameters but the reference's."""
    return {name: leaf for name, leaf in params.items() if name != REFERENCE_TREE}
