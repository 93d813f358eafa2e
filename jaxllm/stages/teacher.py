"""The teacher of a run that distils: its fields, whether the student can learn of it, and its
parameters beside the student's."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxllm.checkpoints.base import TEACHER, place_of
from jaxllm.checkpoints.load import model_config_of, tokenizer_path
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.errors import UserError
from jaxllm.inference.stored_teacher import StoredTeacher
from jaxllm.models.config import ModelConfig, TransformerConfig, bare
from jaxllm.models.families import architecture
from jaxllm.models.pruned import pruned
from jaxllm.models.quantised import check_installed, held
from jaxllm.models.transformer import check_length, param_shapes
from jaxllm.objectives.distillation import TEACHER_TREE
from jaxllm.objectives.matching import Matching, init_projections
from jaxllm.stages.frozen_model import FrozenModel
from jaxllm.stages.training_run import TrainingRun
from jaxllm.tokenizers.tokenizer import Tokenizer, load_tokenizer

_PROJECTIONS_SEED = 1
"""Folded into the run's, whose own makes the student."""
_DTYPES = ("float32", "bfloat16", "int8", "nf4")


@dataclasses.dataclass(frozen=True)
class TeacherFields:
    """What the student learns of."""

    init: str = ""
    """Run directory or Hugging Face folder of the teacher."""
    dtype: str = "float32"
    """In which its parameters are held: `float32`, `bfloat16`, or, the matrices of its attention
    and MLP but for experts, in the 8 and 4 bits of `int8` and `nf4`."""
    top_k: int = 0
    """Ask it once, before the first step, and keep beside the token store so many of its likeliest
    tokens at each place, 4 bytes each (6 of vocabularies above 65,536); 64 are usual. 0: it is
    asked in each step, for all tokens."""

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise ValueError("top_k: must not be negative")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype: must be one of {', '.join(_DTYPES)}; was {self.dtype!r}")


class Teacher:
    """The teacher of a run."""

    def __init__(self, run: TrainingRun[Any], fields: TeacherFields, tokenizer: Tokenizer) -> None:
        """Args:
        run: that learns of it.
        fields: where it is, and how it is held.
        tokenizer: that it shares with the student.
        """
        self._run = run
        self._how = "" if fields.dtype == "float32" else fields.dtype
        self._frozen = FrozenModel(run, fields.init, TEACHER)
        self.model = _teaching(self._frozen.config, tokenizer)
        self._top_k = fields.top_k

    @property
    def shapes(self) -> dict[str, Any]:
        """Of its parameters, as they are held, where they stand beside the student's."""
        shapes = param_shapes(self.model)
        return {TEACHER_TREE: jax.eval_shape(lambda params: held(params, self._how), shapes)}

    def beside(self, student: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        """What makes the student's parameters, with those of the teacher beside them."""
        return lambda: {**student(), **self.alone()}

    def alone(self) -> dict[str, Any]:
        """Its parameters, where they stand beside the student's."""
        params = self._frozen.given_up()
        if how := self._how:  # donated: they are not to be there twice
            params = self._run.laid_out(lambda p: held(p, how), params, donate=True)(params)
        return {TEACHER_TREE: params}

    def stored(self, student: TransformerConfig, temperature: float) -> StoredTeacher:
        """The teacher as one that is asked once, at the temperature of the loss."""
        common = min(self.model.vocab_size, student.vocab_size)
        return StoredTeacher(
            self.model,
            json.dumps([self._frozen.checksums, self._how]),
            lambda: self.alone()[TEACHER_TREE],
            self._run.mesh,
            common,
            min(self._top_k, common),
            temperature,
        )

    def part(self, student: TransformerConfig, layers: Sequence[int]) -> dict[str, Any]:
        """The parameters of a student that begins as a part of it, of these layers."""
        # One that has been asked before is not needed any more.
        params = self._frozen.given_up() if self._top_k else self._frozen.params
        make = functools.partial(pruned, whole=self.model, part=student, layers=layers)
        return self._run.laid_out(make, params)(params)

    def projections(
        self, student: TransformerConfig, matching: Matching
    ) -> Callable[[], dict[str, Any]]:
        """What makes the projections between the inner states of both, if any are to be alike."""
        key = jax.random.fold_in(jax.random.key(self._run.config.seed), _PROJECTIONS_SEED)
        make = functools.partial(init_projections, matching, student, self.model)
        return lambda: self._run.laid_out(make, key)(key)

    def record(self) -> None:
        """Writes which it is, in the first life of the run."""
        self._frozen.record()


def teacher_place(directory: RunDirectory, fields: TeacherFields) -> str:
    """Where the teacher of a run is.

    Raises:
        UserError: it is not told, or there is no model, or none that ours can be; or what is needed
            to hold it so is not installed.
    """
    if not fields.init:
        raise UserError(
            "config.teacher.init: give the run directory or Hugging Face folder of the model to "
            "learn of."
        )
    place = place_of(directory, fields.init, TEACHER)
    model_config_of(place)
    if fields.dtype in ("int8", "nf4"):
        check_installed("config.teacher.dtype")
    return place


def check_teacher(place: str, student: Tokenizer, lengths: Mapping[str, int]) -> TransformerConfig:
    """Checks, before anything slow, that a student can learn of the teacher; gives its model.

    Args:
        place: where the teacher is.
        student: the student's tokenizer.
        lengths: tokens of a row, by the fields that ask for them.

    Raises:
        UserError: it cannot.
    """
    teacher = load_tokenizer(tokenizer_path(place))
    _check_vocabulary(student, teacher, place)
    model = _teaching(model_config_of(place), teacher)
    if not model.causal:
        raise UserError(
            "config.teacher.init: its model sees both ways (model.causal=False), and does not "
            "predict what follows; give one that does."
        )
    for field, length in lengths.items():
        try:
            check_length(model, length, field)
        except UserError as error:
            raise UserError(f"config.teacher.init: {error}") from None
    return model


def _teaching(config: ModelConfig, tokenizer: Tokenizer) -> TransformerConfig:
    """The teacher's model, computed in the way that suits this machine: nothing is kept for a
    backward pass, and nothing dropped."""
    config = dataclasses.replace(bare(config), attention="auto", remat="none")
    config = dataclasses.replace(config, dropout=0.0, embedding_dropout=0.0)
    return architecture(config, tokenizer.vocab_size)


def _check_vocabulary(student: Tokenizer, teacher: Tokenizer, init: str) -> None:
    """Checks that both mean the same by every id; what begins and ends a text may be another, as
    the student's tokenizer lays texts out.

    Raises:
        UserError: they do not; the message names both sizes and the first difference.
    """
    if student.fingerprint == teacher.fingerprint:
        return
    sizes = f"{student.vocab_size:,} tokens and the teacher's {teacher.vocab_size:,}"
    for index in range(max(student.vocab_size, teacher.vocab_size)):
        ours, theirs = (
            repr(each.decode([index], skip_special_tokens=False))
            if index < each.vocab_size
            else "missing"
            for each in (student, teacher)
        )
        if ours != theirs:
            raise UserError(
                f"config.teacher.init: {init} has another vocabulary: the student's has {sizes}; "
                f"the first to differ is {index:,}, {ours} and {theirs}. Give a teacher with the "
                "same tokenizer, or learn of its texts (configs/generate_data.py)."
            )
