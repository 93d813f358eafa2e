"""The `dpo` stage: a tuned model and preferences in, a model that answers as is preferred out."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.data.cleaning import CleaningConfig
from jaxllm.data.config import DataConfig
from jaxllm.data.packing import PartValues
from jaxllm.data.rankings import PreferenceKind, check_preference_data, layout_of
from jaxllm.data.store import TokenStore
from jaxllm.errors import UserError
from jaxllm.evaluation.loss import LossEvaluator
from jaxllm.inference.reference import Reference
from jaxllm.models.config import TransformerConfig
from jaxllm.models.families import architecture
from jaxllm.models.quantised import rounded
from jaxllm.objectives.dpo import DpoLossConfig, dpo
from jaxllm.objectives.kto import ReferencePoint, kto
from jaxllm.objectives.objective import Batch, Objective, Params
from jaxllm.sharding.mesh import batch_sharding
from jaxllm.sharding.processes import is_main
from jaxllm.stages.answer_samples import AnsweringConfig, answer_samples
from jaxllm.stages.continued import check_init, check_writer, model_to_continue
from jaxllm.stages.frozen_model import FrozenModel
from jaxllm.stages.held_out import HeldOut
from jaxllm.stages.reference import (
    NOT_THE_REFERENCE,
    REFERENCE_TREE,
    beside,
    origin_of,
    policy_of,
    with_reference,
    without_pairs,
)
from jaxllm.stages.training_run import TrainingRun, train_in, work_directory
from jaxllm.tokenizers.chat_template import Message
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class DpoFields(DpoLossConfig):
    """How responses are laid out, which loss pairs have, and how the reference is held."""

    template: str = ""
    """By which prompt and response are laid out: `bos_separated`, `chatml`, `llama3`, or a file
    with a Jinja template; empty: that by which `init` was tuned, else `bos_separated`."""
    live_reference: bool = False
    """Compute the reference's log-probabilities in every step, rather than once before the first,
    to be kept beside the token store. With low-rank pairs it is the same base without them; else
    its parameters are held too. `kto` does it anyway."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.live_reference and not self.has_reference:
            raise ValueError(f"live_reference: {self.loss} has no reference; leave it out")

    @property
    def asks_in_steps(self) -> bool:
        """Whether the reference is asked in every step."""
        return self.live_reference or self.unpaired

    @property
    def unpaired(self) -> bool:
        """Whether the loss is of single responses."""
        return self.loss == "kto"


@dataclasses.dataclass(frozen=True)
class DpoConfig(AnsweringConfig):
    """A model trained to answer as is preferred, from preferences themselves."""

    stage: str = "dpo"
    """Always `dpo`."""
    init: str = ""
    """Run directory or Hugging Face folder to take parameters, model and tokenizer from; it is the
    reference too."""
    data: DataConfig = DataConfig(
        train="builtin:pydocs_preference",
        packing="best_fit",
        # What many prompts share would make copies of them.
        cleaning=CleaningConfig(near_duplicates=0.0),
    )
    dpo: DpoFields = DpoFields()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dpo.unpaired and self.data.packing != "best_fit":
            raise ValueError(
                "data.packing: kto shows responses to the other prompts of their row; take best_fit"
            )
        if self.dpo.unpaired and self.data.cleaning.near_duplicates:
            raise ValueError(
                "data.cleaning.near_duplicates: kto's responses to one prompt would be taken for "
                "copies of each other; leave it at 0"
            )
        check_preference_data(self.data)
        changed = self.lora.rank and self.train.trainable not in (".*", "lora")
        if self.dpo.asks_in_steps and changed:
            asker = "dpo.loss: kto's reference" if self.dpo.unpaired else "dpo.live_reference:"
            raise ValueError(
                f"{asker} is the base without pairs, and train.trainable changes it; leave one of "
                "both out"
            )

    @property
    def trained(self) -> str:
        return f"{NOT_THE_REFERENCE}(?:{super().trained})"

    @property
    def kept(self) -> str:
        return f"{NOT_THE_REFERENCE}(?:{super().kept})"  # it can be had from `init` again


def run(config: DpoConfig, workdir: Path | None) -> None:
    """Trains the policy on pairs of responses, and writes samples and report."""
    check_init(config.init, "configs/sft.py")
    directory = work_directory(workdir)
    model, path = model_to_continue(config.init, config.model, directory)
    config = dataclasses.replace(config, model=model)
    train_in(directory, config, TokenizerConfig(path=path), _check, _work)


def _check(config: DpoConfig, tokenizer: TokenizerConfig) -> None:
    """Checks, before anything slow, that the model can be trained so.

    Raises:
        UserError: it cannot.
    """
    loaded = load_tokenizer(tokenizer.path)
    check_writer(config, config.data, loaded)
    layout_of(loaded, config.dpo.template, "config.dpo.template")


def _work(run: TrainingRun[DpoConfig]) -> dict[str, float]:
    """The run itself; its scores."""
    config = run.config
    template = layout_of(
        load_tokenizer(run.tokenizer.path), config.dpo.template, "config.dpo.template"
    )
    corpus = run.corpus(config.data, PreferenceKind(template, config.dpo.unpaired))
    # Kept with the run: whoever speaks to the model later does it as it was trained.
    corpus.tokenizer.chat_template = template.source
    stores = (*corpus.train, corpus.eval)
    model = architecture(config.model, corpus.tokenizer.vocab_size)
    origin = origin_of(run, run.config.init)
    part_values = _stored_reference(run, stores, model, origin)
    rows = run.rows(config.data, corpus, lambda store: part_values[store.path])
    reference = None
    if config.dpo.asks_in_steps:
        reference = without_pairs if config.lora.rank else beside
    point: ReferencePoint | None = None
    if config.dpo.unpaired:
        assert reference is not None
        _check_both_kinds(corpus.train)
        point = ReferencePoint(model, reference, batch_sharding(run.mesh), config.micro_batches)
        objective = kto(model, config.dpo, reference, point)
    else:
        largest = max(store.most_parts for store in stores)
        objective = dpo(model, config.dpo, largest, reference)
    write_samples = answer_samples(run, corpus, template, model, config.data.seq_len, _asked)
    evaluation = HeldOut(
        config,
        config.data,
        corpus.eval,
        run.mesh,
        _measure(objective, config.dpo, point),
        lambda step, params: write_samples(step, policy_of(params)),
        part_values[corpus.eval.path],
    )
    run.begin(corpus, rows)
    if config.dpo.has_reference:
        origin.record()
    held = config.dpo.asks_in_steps and not config.lora.rank
    shapes = run.param_shapes(model)
    scores = run.train(
        rows,
        model,
        objective,
        evaluation,
        initial_params=(lambda: with_reference(origin.params)) if held else None,
        param_shapes={**shapes, REFERENCE_TREE: shapes} if held else None,
    )
    if not is_main():
        return {}
    counts = {
        "data/truncated": float(sum(store.truncated for store in stores)),
        "data/dropped": float(sum(store.dropped for store in stores)),
    }
    return run.data_scores(corpus, rows) | scores | counts


def _check_both_kinds(stores: Sequence[TokenStore]) -> None:
    """Checks that there are good and bad responses to learn from.

    Raises:
        UserError: there are not.
    """
    kinds = {
        bool(score)
        for store in stores
        for number in range(len(store.shards))
        for score in np.unique(store.scores(number))
    }
    if len(kinds) < 2:
        missing = "bad" if kinds == {True} else "good"
        raise UserError(
            f"config.data.train: kto learns from good and bad responses, and there is no {missing} "
            "one; look at the records' `label`."
        )


def _stored_reference(
    run: TrainingRun[DpoConfig],
    stores: Sequence[TokenStore],
    model: TransformerConfig,
    origin: FrozenModel,
) -> dict[Path, Mapping[str, Sequence[PartValues]]]:
    """What rows of each store tell of the reference; nothing where it is not asked before."""
    config, data = run.config, run.config.data
    if config.dpo.asks_in_steps or not config.dpo.has_reference:
        return {store.path: {} for store in stores}
    how = config.lora.base
    with run.ledger.spending("data"):
        identity = json.dumps([origin.checksums, how])
        # As it stands under the pairs, if there are any.
        load = (
            (lambda: jax.jit(rounded, static_argnums=1)(origin.params, how))
            if how
            else (lambda: origin.params)
        )
        reference = Reference(model, identity, load, run.mesh)
        rows = config.batch_size // config.micro_batches
        return {
            store.path: reference.of_store(store, data.packing, data.seq_len, rows, run.phases)
            for store in stores
        }


def _measure(
    objective: Objective, config: DpoFields, point: ReferencePoint | None
) -> Callable[[Params, Params, Iterable[Batch]], dict[str, float]]:
    """Scores of parameters on held-out rankings."""
    evaluate = LossEvaluator(objective)
    names = ("loss", "accuracy", "margin", *(("log_ratio",) if config.has_reference else ()))

    def measure(params: Params, frozen: Params, batches: Iterable[Batch]) -> dict[str, float]:
        if point:
            batches = point.of_all(params, frozen, batches)
        measured = evaluate(params, frozen, batches)
        found = {name: mean for name, (mean, _) in measured.items()}
        # Of single responses it cannot be told where all that are held out are good, or bad.
        if point and measured["better"][1] and measured["worse"][1]:
            found["margin"] = found["better"] - found["worse"]
        return {f"eval/{name}": found[name] for name in names if name in found}

    return measure


def _asked(record: Mapping[str, Any]) -> Sequence[Message]:
    """What the responses of a ranking follow."""
    return record["messages"]
