"""The reference that a run holds its policy to: found again in each life, beside the policy."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm import trees
from jaxllm.checkpoints.base import REFERENCE
from jaxllm.models.lora import PAIRS
from jaxllm.objectives.objective import Params
from jaxllm.stages.frozen_model import FrozenModel
from jaxllm.stages.training_run import TrainingRun

REFERENCE_TREE = "reference"
"""Where its parameters stand, if they are held beside the policy's."""
NOT_THE_REFERENCE = f"(?!{REFERENCE_TREE}/)"
"""Begins the pattern of other parameters."""


def origin_of(run: TrainingRun[Any], init: str) -> FrozenModel:
    """The model that a run begins from, or another of the same kind, and is held to."""
    return FrozenModel(run, init, REFERENCE, run.config.model)


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
