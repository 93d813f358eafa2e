"""The student of a run that distils: its model, what it begins with, and where its parameters stand
among those of the run."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from jaxllm.checkpoints.load import model_config_of
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.errors import UserError
from jaxllm.models.config import ModelConfig, TransformerConfig, bare
from jaxllm.models.families import completed
from jaxllm.models.pruned import SIZES, part_layers, part_of
from jaxllm.objectives.distillation import TEACHER_TREE
from jaxllm.objectives.matching import PROJECTIONS
from jaxllm.objectives.objective import Params
from jaxllm.stages.continued import continued_model
from jaxllm.stages.teacher import Teacher
from jaxllm.stages.training_run import TrainingRun

_ATTENDING = (
    *("causal", "window", "attention_soft_cap"),
    *("rope_theta", "rope_local_theta", "rope_scaling"),
)
"""How layers attend, of which a part is made as it was."""


@dataclasses.dataclass(frozen=True)
class PrunedStartFields:
    """Whether a student begins as a part of its teacher."""

    pruned_start: bool = False
    """Begin as a part of the teacher: as many of its layers, channels, heads and MLP units as
    `model` says, those whose weights are largest; all else is as in the teacher."""
    pruned_layers: str = ""
    """The teacher's layers that are taken, counted from 1, as `1,4`. Empty: evenly spaced, the
    first and the last among them."""

    def __post_init__(self) -> None:
        if self.pruned_layers and not self.pruned_start:
            raise ValueError("pruned_layers: nothing reads it without pruned_start")
        if not all(layer.strip().isdecimal() for layer in self._named):
            raise ValueError(
                f"pruned_layers: is a list of layers, as 1,4; was given {self.pruned_layers!r}"
            )

    @property
    def _named(self) -> list[str]:
        return self.pruned_layers.split(",") if self.pruned_layers else []

    def taken(self, teacher: TransformerConfig, student: TransformerConfig) -> list[int]:
        """The teacher's layer, counted from 0, that each of the student's is taken from.

        Raises:
            UserError: they cannot be.
        """
        named = [int(layer) for layer in self._named]
        return part_layers(named, teacher, student, "config.distill.pruned_layers")


def model_of_part(given: ModelConfig, directory: RunDirectory, place: str) -> ModelConfig:
    """The model of a student that begins as a part of the teacher, in the sizes given; of a run
    that has begun, as it was.

    Args:
        given: `model` of the configuration.
        directory: of the run.
        place: where the teacher is; once begun, the run needs it no more for this.

    Raises:
        UserError: it can't be a part of it.
    """
    if directory.config_path.exists():
        return continued_model(given, model_config_of(directory.path), "the run")
    recorded = bare(model_config_of(place))
    head_dim = completed(recorded).head_dim
    if given.head_dim not in (0, head_dim):
        raise UserError(
            f"config.model.head_dim: heads of a part are as wide as the teacher's, {head_dim}; "
            "leave it out."
        )
    as_large = {name: getattr(recorded, name) for name in (*SIZES, "head_dim")}
    same = continued_model(dataclasses.replace(given, **as_large), recorded, "config.teacher.init")
    for name in _ATTENDING:
        if getattr(same, name) != getattr(recorded, name):
            raise UserError(
                f"config.model.{name}: a part attends as the teacher does, by "
                f"{getattr(recorded, name)!r}; leave it out."
            )
    part = part_of(given, same)
    sizes = ", ".join(f"{name} {getattr(part, name)}" for name in SIZES)
    print(f"the student begins as a part of {place}: {sizes}", file=sys.stderr)
    return part


def beginning(
    run: TrainingRun[Any], model: TransformerConfig, teacher: Teacher, fields: PrunedStartFields
) -> Callable[[], dict[str, Any]]:
    """What makes the parameters that the student begins with."""
    if run.config.init:
        return lambda: run.loaded_params(model)
    if fields.pruned_start:
        return lambda: teacher.part(model, fields.taken(teacher.model, model))
    return run.random_params(model)


def student_of(params: Params) -> Params:
    """The student's parameters among those of a run."""
    beside = (TEACHER_TREE, PROJECTIONS)
    return {name: leaf for name, leaf in params.items() if name not in beside}


def beside_the_teacher(pattern: str) -> str:
    """The pattern of what a run trains or keeps: the student's parameters that match one, and all
    projections, but nothing of the teacher."""
    return f"{PROJECTIONS}/.*|(?!{TEACHER_TREE}/)(?:{pattern})"
