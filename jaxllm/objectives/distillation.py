"""Distillation: a student learns of each token what its teacher would have said (`ops.divergence`).

A batch has what next-token prediction has; `loss_weights` say of which tokens is learnt, of a text
all, of conversations the answers, of a rollout what the student wrote itself. The teacher's
parameters stand beside the student's in `TEACHER_TREE`, frozen, and it is asked in the step; or the
batch has what it said before, `teacher_ids` int32 and `teacher_log_probs` float32 [batch, seq, k].
Of one that is asked inner states can be matched too (`objectives.matching`).
"""

import jax.numpy as jnp

from jaxllm import trees
from jaxllm.models.config import TransformerConfig
from jaxllm.models.transformer import Output, Transformer, output_head
from jaxllm.objectives.matching import (
    NOTHING,
    PROJECTIONS,
    Matching,
    matching_sums,
    matching_weights,
)
from jaxllm.objectives.objective import Batch, Metrics, Objective, Params, RowKeys, Sums
from jaxllm.objectives.router import router_coefficients, router_sums, router_weights
from jaxllm.ops.divergence import DivergenceConfig, Live, Stored, divergence_sums

TEACHER_TREE = "teacher"
"""Where the teacher's parameters stand."""
TEACHER_IDS, TEACHER_LOG_PROBS = "teacher_ids", "teacher_log_probs"
_TERM = "distillation"


def distillation(
    model: TransformerConfig,
    config: DivergenceConfig,
    teacher: TransformerConfig | None,
    matching: Matching = NOTHING,
) -> Objective:
    """The loss of `DivergenceConfig`, a mean over the batch's `loss_weights`.

    Where one of both models has more rows than the other, which no token needs, these are left out.

    Metrics, means too: `loss`, the cross-entropy of the text's own tokens, in nats; `divergence`;
    `agreement`, the share of tokens where the likeliest of both is the same; and of a teacher that
    is asked `teacher_loss`, its own cross-entropy, and those of what is matched.

    Args:
        model: the student's.
        config: of the loss.
        teacher: the teacher's; None: batches have what it said.
        matching: which of its inner states count beside, if it is asked.
    """
    recorded = list(matching.coefficients)
    assert teacher or not recorded, "what was said before has nothing inside"

    common = min(model.vocab_size, teacher.vocab_size) if teacher else model.vocab_size

    def weights(batch: Batch) -> Sums:
        own = {_TERM: jnp.sum(batch["loss_weights"])} | matching_weights(matching, batch)
        return own | router_weights(model, batch)

    def sums(
        params: Params, batch: Batch, frozen: Params, row_keys: RowKeys
    ) -> tuple[Sums, Metrics]:
        params = trees.merge(params, frozen)
        output, inside = _forward(model, params, batch, row_keys, recorded)
        if teacher:
            of_teacher = params[TEACHER_TREE]
            asked, inside_teacher = _forward(teacher, of_teacher, batch, None, recorded)
            head = output_head(teacher, of_teacher).first(common)
            said: Live | Stored = Live(asked.hidden, head)
        else:
            said = Stored(batch[TEACHER_IDS], batch[TEACHER_LOG_PROBS])
        found = divergence_sums(
            output.hidden,
            output_head(model, params).first(common),
            said,
            batch["targets"],
            batch["loss_weights"],
            config,
        )
        total = jnp.sum(batch["loss_weights"])
        metrics = {
            "loss": (found.cross_entropy, total),
            "divergence": (found.divergence, total),
            "agreement": (found.agreement, total),
        }
        terms = {_TERM: found.loss}
        if teacher:
            metrics["teacher_loss"] = (found.teacher, total)
        if teacher and recorded:
            both, passes = (model, teacher), (inside, inside_teacher)
            more = matching_sums(matching, both, passes, params[PROJECTIONS], batch)
            terms, metrics = terms | more[0], metrics | more[1]
        router_terms, router_metrics = router_sums(model, output.router, batch)
        return terms | router_terms, metrics | router_metrics

    coefficients = {_TERM: 1.0} | dict(matching.coefficients) | router_coefficients(model)
    return Objective(coefficients, weights, sums)


def _forward(
    model: TransformerConfig,
    params: Params,
    batch: Batch,
    row_keys: RowKeys,
    recorded: list[str],
) -> tuple[Output, trees.Tree]:
    """What a pass gives, and what is recorded of it."""
    output, found = Transformer(model).apply(
        {"params": params},
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        dropout_keys=row_keys,
        mutable=recorded,
    )
    assert isinstance(output, Output)
    return output, found
