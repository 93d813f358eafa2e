"""What a student loses by being another inside than its teacher, layer by layer (`ops.matching`).

The projections between both are parameters of the run, in the tree `PROJECTIONS`, learnt with the
student and no part of it: `hidden` [pairs, embed, wide] and `attention` [pairs, heads, wide_heads].
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm import trees
from jaxllm.errors import UserError
from jaxllm.models.config import TransformerConfig
from jaxllm.models.intermediates import ATTENTION, HIDDEN, of_layer
from jaxllm.objectives.objective import Batch, Metrics, Sums
from jaxllm.ops.attention.visibility import Places, Rule
from jaxllm.ops.matching import Heads, attention_divergence, hidden_error

PROJECTIONS = "projections"
"""Where the projections stand."""


class Matching(NamedTuple):
    """What of two models is to be alike."""

    coefficients: Mapping[str, float]
    """Of the terms in the loss, by the collections that passes are asked for; empty: nothing."""
    pairs: Sequence[tuple[int, int]]
    """Layers of the student and of its teacher, counted from 0."""


NOTHING = Matching({}, ())


@dataclasses.dataclass(frozen=True)
class MatchingConfig:
    """Which inner states are to be like the teacher's, and what that counts in the loss."""

    hidden_coef: float = 0.0
    """Of the hidden states behind each layer of `layer_map`: what a learned projection of the
    student's lacks of the teacher's, squared, over the teacher's square."""
    attention_coef: float = 0.0
    """Of the attention of these layers: the KL divergence, in nats, of where the student's heads
    look, their scores mixed by a learned projection, from where the teacher's do."""
    layer_map: str = ""
    """Pairs `student:teacher` of layers counted from 1, as `1:2,2:4`. Empty: each of the student's
    has one, evenly spaced, the last the last."""

    def __post_init__(self) -> None:
        for name in ("hidden_coef", "attention_coef"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: must be a number from 0 on")
        _parsed(self.layer_map)

    @property
    def matches(self) -> bool:
        """Whether anything counts."""
        return bool(self.hidden_coef or self.attention_coef)

    def of(self, student: TransformerConfig, teacher: TransformerConfig) -> Matching:
        """The same of two models.

        Raises:
            UserError: a layer is named that there is not.
        """
        coefficients = {HIDDEN: self.hidden_coef, ATTENTION: self.attention_coef}
        pairs = _pairs(self.layer_map, student.layers, teacher.layers)
        return Matching({name: value for name, value in coefficients.items() if value}, pairs)


def _pairs(layer_map: str, student: int, teacher: int) -> list[tuple[int, int]]:
    """The pairs of a map, or those that an empty one stands for."""
    if not layer_map:
        return [(index, -(-(index + 1) * teacher // student) - 1) for index in range(student)]
    pairs = _parsed(layer_map)
    for whose, layers, most in zip(
        ("the student", "the teacher"), zip(*pairs, strict=True), (student, teacher), strict=True
    ):
        if max(layers) > most:
            raise UserError(
                f"config.distill.layer_map: {whose} has {most} layers, and layer {max(layers)} is "
                "named."
            )
    return [(ours - 1, theirs - 1) for ours, theirs in pairs]


def init_projections(
    matching: Matching, student: TransformerConfig, teacher: TransformerConfig, key: jax.Array
) -> dict[str, Any]:
    """Projections that begin as the identity where both sizes are the same, else drawn (hidden
    states), or each head as a copy of one (attention); empty if none are needed."""
    pairs = matching.pairs
    made = {}
    if HIDDEN in matching.coefficients:
        shape = (student.width, teacher.width)
        same = student.width == teacher.width
        drawn = jax.random.normal(key, (len(pairs), *shape)) * student.width**-0.5
        made[HIDDEN] = jnp.broadcast_to(jnp.eye(*shape), drawn.shape) if same else drawn
    if ATTENTION in matching.coefficients:
        ours, theirs = (model.unrolled[0].attention.heads for model in (student, teacher))
        source = jnp.arange(theirs) * ours // theirs
        mix = (jnp.arange(ours)[:, None] == source).astype(jnp.float32)
        made[ATTENTION] = jnp.broadcast_to(mix, (len(pairs), *mix.shape))
    return {PROJECTIONS: made} if made else {}


def matching_sums(
    matching: Matching,
    models: tuple[TransformerConfig, TransformerConfig],
    recorded: tuple[trees.Tree, trees.Tree],
    projections: Mapping[str, jax.Array],
    batch: Batch,
) -> tuple[Sums, Metrics]:
    """Terms `hidden` and `attention`, as far as they count, means over the mapped layers; and
    metrics of the same as `hidden_error` and `attention_divergence`.

    Args:
        matching: what counts.
        models: of student and teacher.
        recorded: what their passes gave.
        projections: of `init_projections`.
        batch: its `loss_weights` say which tokens count.
    """
    weights = batch["loss_weights"]
    pairs = matching.pairs
    found = {}
    for collection in matching.coefficients:
        total = jnp.zeros((), jnp.float32)
        for pair, projection in zip(pairs, projections[collection], strict=True):
            inside = [
                of_layer(model, tree, collection, number)
                for model, tree, number in zip(models, recorded, pair, strict=True)
            ]
            if collection == HIDDEN:
                ours, theirs = (states["hidden"] for states in inside)
                total += hidden_error(ours, theirs, projection, weights)
            else:
                student, teacher = (
                    Heads(states["queries"], states["keys"], _rule(model, number))
                    for states, model, number in zip(inside, models, pair, strict=True)
                )
                total += attention_divergence(student, teacher, projection, _places(batch), weights)
        found[collection] = total / len(pairs)
    names = {HIDDEN: "hidden_error", ATTENTION: "attention_divergence"}
    weight = jnp.sum(weights)
    return found, {names[term]: (total, weight) for term, total in found.items()}


def matching_weights(matching: Matching, batch: Batch) -> Sums:
    """What the sums are divided by."""
    return dict.fromkeys(matching.coefficients, jnp.sum(batch["loss_weights"]))


def _places(batch: Batch) -> Places:
    positions, segment_ids = batch["positions"], batch["segment_ids"]
    return Places(positions, positions, segment_ids, segment_ids)


def _rule(model: TransformerConfig, number: int) -> Rule:
    layer = model.unrolled[number].attention
    return Rule(layer.causal, layer.window, layer.soft_cap, layer.scale, in_order=True)


def _parsed(layer_map: str) -> list[tuple[int, int]]:
    """The pairs as they are written.

    Raises:
        ValueError: they are written otherwise, or the student's layers are not in order.
    """
    pairs = []
    for pair in filter(None, layer_map.split(",")):
        ours, separator, theirs = pair.partition(":")
        if not (separator and ours.strip().isdecimal() and theirs.strip().isdecimal()):
            raise ValueError(
                f"layer_map: is a list of pairs student:teacher, as 1:2,2:4, and has {pair!r}"
            )
        pairs.append((int(ours), int(theirs)))
    if layer_map and not pairs:
        raise ValueError(f"layer_map: has no pair; was {layer_map!r}")
    if any(layer < 1 for pair in pairs for layer in pair):
        raise ValueError("layer_map: layers are counted from 1")
    students = [pair[0] for pair in pairs]
    if students != sorted(set(students)):
        raise ValueError("layer_map: the student's layers must rise, each once")
    return pairs
