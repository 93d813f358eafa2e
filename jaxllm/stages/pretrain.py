"""The `pretrain` stage: text in, trained model out."""

import contextlib
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllm import trees
from jaxllm.checkpoints.load import load_model, model_config_of, tokenizer_path
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.batches import BatchSource, EvalBatches
from jaxllm.data.config import DataConfig
from jaxllm.data.corpus import Corpus, prepare_corpus
from jaxllm.data.packing import packed_rows
from jaxllm.data.store import TokenStore
from jaxllm.data.training_rows import TrainingRows, training_rows
from jaxllm.errors import UserError
from jaxllm.evaluation.loss import LossEvaluator, text_scores
from jaxllm.evaluation.ngrams import MAX_TRAIN_TOKENS
from jaxllm.evaluation.references import reference_scores
from jaxllm.files import locked
from jaxllm.host_memory import keep_freed_memory_on_cpu
from jaxllm.inference.engine import Engine, check_prompt
from jaxllm.models.config import ModelConfig, TransformerConfig
from jaxllm.models.families import architecture
from jaxllm.models.transformer import SHARDING_RULES, check_length, init_params, param_shapes
from jaxllm.objectives.masked_word import mask_id
from jaxllm.objectives.objective import Params
from jaxllm.objectives.pretraining import KINDS, ObjectiveConfig, check_model, make_objective
from jaxllm.planning.flops import model_training_flops_per_token
from jaxllm.reporting.goodput import Ledger
from jaxllm.reporting.phases import Phases
from jaxllm.reporting.report import write_report
from jaxllm.reporting.samples import append_samples
from jaxllm.reporting.tables import print_summary
from jaxllm.sharding.mesh import batch_sharding, make_mesh
from jaxllm.sharding.processes import check_shared, from_main, is_main, main_first
from jaxllm.sharding.rules import shardings
from jaxllm.stages.continued import continued_model
from jaxllm.stages.data_scores import data_scores, phase_scores, print_mixture, source_scores
from jaxllm.stages.fields import SamplingFields, TrainingFields
from jaxllm.stages.fit import check_batch, check_patterns, fit, is_finished
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.tokenizer import configured_tokenizer
from jaxllm.training.state import TrainState

# xz takes a second for 2 MB, and looks back this far.
_REFERENCE_BYTES = 64 * 2**20
_SAMPLES = 2
_PATIENCE_SECONDS = 60.0
"""How long a run waits for another one in its directory, which may just be ending."""


@dataclasses.dataclass(frozen=True)
class PretrainConfig(TrainingFields, SamplingFields):
    """A model trained on text from random parameters, or further from another run's, or from
    published weights."""

    stage: str = "pretrain"
    """Always `pretrain`."""
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    references: bool = True
    """Whether to measure gzip, xz and n-gram models on the held-out text, to compare with; left out
    beyond 64 MiB of held-out or 1 GiB of training text, and where not every token is predicted."""

    def __post_init__(self) -> None:
        TrainingFields.__post_init__(self)
        SamplingFields.__post_init__(self)


def run(config: PretrainConfig, workdir: Path | None) -> None:
    """Prepares text and tokenizer, trains, evaluates, and writes samples, report and summary."""
    ledger = Ledger(time.monotonic())
    keep_freed_memory_on_cpu()
    if workdir is None:
        raise UserError("--workdir is missing: give the directory that the run is to be kept in.")
    directory = RunDirectory(workdir)
    if config.init:
        config = _continuing(config, directory)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    begun_with = from_main(directory.data)
    tokenizer = config.tokenizer
    if begun_with and tokenizer.path:  # the run has its own copy
        tokenizer = dataclasses.replace(tokenizer, path=str(directory.tokenizer))
    _check_model(config, tokenizer)
    with main_first():
        directory.open(dataclasses.asdict(config), dataclasses.asdict(PretrainConfig()))
    check_shared(directory.path, "--workdir")
    with locked(workdir, _PATIENCE_SECONDS) if is_main() else contextlib.nullcontext():
        if from_main(lambda: is_finished(config, directory)):
            print(f"{workdir}: the run is finished; raise config.steps to train on.")
            return
        _run(config, workdir, mesh, tokenizer, begun_with, ledger)


def _run(
    config: PretrainConfig,
    workdir: Path,
    mesh: Mesh,
    tokenizer: TokenizerConfig,
    begun_with: dict[str, str],
    ledger: Ledger,
) -> None:
    """The run itself, once its directory is its own."""
    directory, begin, phases = RunDirectory(workdir), time.monotonic(), Phases()
    with ledger.spending("data"), main_first():
        corpus = prepare_corpus(config.data, tokenizer, workdir, phases, begun_with)
    model = architecture(config.model, corpus.tokenizer.vocab_size)
    if config.tokenizer.path and not begun_with and is_main():  # a trained one is there already
        corpus.tokenizer.save(directory.tokenizer)
    with ledger.spending("data"):
        rows = training_rows(config.data, corpus, config.seed, config.steps * config.batch_size)
    evaluation = _Evaluation(config, directory, mesh, corpus, model)
    if is_main():
        directory.begin(dataclasses.asdict(config), corpus.fingerprints)
        ledger.keep(directory.goodput)
    print_mixture(rows, config.steps * config.batch_size)
    with jax.set_mesh(mesh):
        scores = _train(config, directory, mesh, rows, model, evaluation, ledger)
    if not is_main():
        return
    scores = data_scores(corpus) | scores
    scores |= source_scores(rows) | rows.scalars(config.steps * config.batch_size)
    every_token = KINDS[config.objective.kind].every_token
    if config.references and every_token and _affordable(corpus):
        scores |= _references(corpus)
    scores |= phase_scores(phases)
    scores |= ledger.finish()
    scores["time/total"] = time.monotonic() - begin
    directory.write_summary(scores)
    report = write_report(workdir)
    print_summary(scores)
    print(f"report: {report}")


def _continuing(config: PretrainConfig, directory: RunDirectory) -> PretrainConfig:
    """The configuration of a run that begins from another, or from published weights: their
    model and tokenizer are used.

    Once begun, the run needs them no more.
    """
    begun = directory.config_path.exists()
    model = model_config_of(directory.path if begun else config.init)
    path = str(tokenizer_path(config.init))
    if begun:
        path = directory.config().get("tokenizer", {}).get("path", path)
    print(f"model and tokenizer are those of {config.init}", file=sys.stderr)
    return dataclasses.replace(
        config,
        model=continued_model(config.model, model),
        tokenizer=dataclasses.replace(config.tokenizer, path=path),
    )


def _check_model(config: PretrainConfig, tokenizer: TokenizerConfig) -> None:
    """Checks, before anything slow, that model and tokenizer fit the objective and the rows, and
    that patterns over parameters match some.

    Raises:
        UserError: they do not.
    """
    # The size of the vocabulary is not known yet where the tokenizer is at a path.
    model = architecture(config.model, 1 if tokenizer.path else tokenizer.vocab_size)
    check_model(model, config.objective)
    check_length(model, config.data.seq_len, "config.data.seq_len")
    check_patterns(config, param_shapes(model))
    if KINDS[config.objective.kind].needs_mask and tokenizer.path:
        mask_id(configured_tokenizer(tokenizer))
    if not config.model.causal:
        print("the model sees both ways, and so cannot write: no samples", file=sys.stderr)


def _train(
    config: PretrainConfig,
    directory: RunDirectory,
    mesh: Mesh,
    rows: TrainingRows,
    model: TransformerConfig,
    evaluation: "_Evaluation",
    ledger: Ledger,
) -> dict[str, float]:
    """Trains over the mesh in use; returns the final scores."""
    shapes = param_shapes(model)
    source = BatchSource(rows.mixture, config.batch_size, batch_sharding(mesh))
    predicted = KINDS[config.objective.kind].predicted(config.objective)
    try:
        state, frozen, measured = fit(
            config,
            directory,
            mesh,
            objective=evaluation.objective,
            initial_params=_initial_params(config, model, shapes, mesh),
            param_shapes=shapes,
            rules=SHARDING_RULES,
            source=source,
            evaluate=evaluation,
            ledger=ledger,
            flops_per_token=model_training_flops_per_token(model, config.data.seq_len, predicted),
            source_scalars=lambda step: rows.scalars(step * config.batch_size),
        )
    finally:
        source.close()
    tokens_per_step = config.batch_size * config.data.seq_len
    return (
        evaluation.final_scores(state, frozen)
        | measured
        | {
            "model/parameters": float(trees.size(shapes)),
            "train/tokens": float(config.steps * tokens_per_step),
            "train/skipped": float(state.skipped),
        }
    )


class _Evaluation:
    """Scores on held-out text, and samples, at a step of training."""

    def __init__(
        self,
        config: PretrainConfig,
        directory: RunDirectory,
        mesh: Mesh,
        corpus: Corpus,
        model: TransformerConfig,
    ) -> None:
        self._config, self._directory, self._corpus, self._model = config, directory, corpus, model
        data = config.data
        self._rows = packed_rows(corpus.eval, data.packing, data.seq_len, data.document_mask)
        self._sharding = batch_sharding(mesh)
        self.objective = make_objective(model, config.objective, corpus.tokenizer)
        self._evaluate = LossEvaluator(self.objective)
        self._latest: dict[int, dict[str, float]] = {}
        self._predicted = math.nan  # tokens of the latest evaluation
        self._context = model.max_positions or config.data.seq_len
        length = 1 + len(corpus.tokenizer.encode(config.prompt))
        check_prompt(length, self._context, "config.prompt")

    def __call__(self, step: int, state: TrainState, frozen: Params) -> dict[str, float]:
        scores = self._scores(state, frozen, self._config.eval.max_batches)
        self._latest = {step: scores}
        self._write_samples(step, trees.merge(state.evaluation_params, frozen))
        return scores

    def final_scores(self, state: TrainState, frozen: Params) -> dict[str, float]:
        """Scores on all held-out text."""
        scores = self._latest.get(int(state.step))  # the loop has evaluated its last step
        if scores is None or self._config.eval.max_batches:
            scores = self._scores(state, frozen)
        if not KINDS[self._config.objective.kind].every_token:
            scores = scores | {"eval/tokens": self._predicted}
        return scores

    def _scores(self, state: TrainState, frozen: Params, max_batches: int = 0) -> dict[str, float]:
        """Scores on all held-out text, or on some batches spread over it."""
        config = self._config
        rows = config.batch_size // config.micro_batches  # as many as training holds at once
        batches = EvalBatches(self._rows, rows, self._sharding, max_batches)
        loss, self._predicted = self._evaluate(state.evaluation_params, frozen, batches)["loss"]
        if not KINDS[config.objective.kind].every_token:
            return {"eval/loss": loss}
        # Where only some batches are evaluated, all text is taken to have as many tokens a byte.
        return text_scores(loss, self._corpus.eval)

    def _write_samples(self, step: int, params: Params) -> None:
        config = self._config
        if not self._model.causal:
            return
        engine = Engine(
            self._model,
            params,
            self._corpus.tokenizer,
            context=self._context,
            prompt_is_prefix=KINDS[config.objective.kind].prompt_is_prefix,
        )
        texts = engine.generate([config.prompt] * _SAMPLES, config.sampling(), config.seed)
        if not is_main():
            return
        append_samples(self._directory.samples, step, [(config.prompt, text) for text in texts])


def _initial_params(
    config: PretrainConfig, model: TransformerConfig, shapes: Params, mesh: Mesh
) -> Callable[[], dict[str, Any]]:
    """What makes the parameters that training begins from: random ones, or those of `init`."""
    if config.init:
        return lambda: load_model(config.init, mesh, config.model).params
    layout = shardings(shapes, SHARDING_RULES, mesh)
    key = jax.random.key(config.seed)
    return lambda: jax.jit(lambda key: init_params(model, key), out_shardings=layout)(key)


def _affordable(corpus: Corpus) -> bool:
    small = corpus.eval.num_bytes <= _REFERENCE_BYTES
    return small and corpus.split.train_bytes <= 16 * _REFERENCE_BYTES


def _references(corpus: Corpus) -> dict[str, float]:
    """What classical methods reach on the same held-out text; of much training text, as many
    documents as they can take, spread evenly over all of it."""
    stride = -(-corpus.split.train_bytes // _REFERENCE_BYTES)
    return reference_scores(
        "".join(itertools.islice(corpus.train_texts(), 0, None, stride)).encode(),
        "".join(corpus.eval_texts()).encode(),
        _sampled_tokens(corpus.train, MAX_TRAIN_TOKENS),
        _sampled_tokens([corpus.eval], corpus.eval.num_tokens),
        corpus.tokenizer.vocab_size + 1,
        ignore=corpus.tokenizer.vocab_size,
    )


def _sampled_tokens(stores: Sequence[TokenStore], limit: int) -> np.ndarray:
    """The tokens of every so-many-th document, `limit` or somewhat fewer.

    The token that opens a document, which nobody has to predict, becomes an id of its own, the
    size of the vocabulary: in some vocabularies it is the one that closes documents too.
    """
    stride = -(-sum(store.num_tokens for store in stores) // limit)
    kept = []
    for store in stores:
        for shard in range(len(store.shards)):
            tokens, offsets = store.tokens(shard).astype(np.uint32), store.offsets(shard)
            tokens[offsets[:-1]] = store.vocab_size
            taken = np.arange(len(offsets) - 1) % stride == 0
            kept.append(tokens[np.repeat(taken, np.diff(offsets))] if stride > 1 else tokens)
    return np.concatenate(kept)
