"""The `pretrain` stage: text in, trained model out."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxllm.data.config import DataConfig
from jaxllm.data.corpus import Corpus
from jaxllm.data.store import TokenStore
from jaxllm.evaluation.loss import LossEvaluator, text_scores
from jaxllm.evaluation.ngrams import MAX_TRAIN_TOKENS
from jaxllm.evaluation.references import reference_scores
from jaxllm.models.families import architecture
from jaxllm.models.transformer import check_length, param_shapes
from jaxllm.objectives.masked_word import mask_id
from jaxllm.objectives.objective import Batch, Objective, Params
from jaxllm.objectives.pretraining import KINDS, ObjectiveConfig, check_model, make_objective
from jaxllm.sharding.processes import is_main
from jaxllm.stages.continued import model_to_continue, with_pairs
from jaxllm.stages.fields import ModelTrainingFields, SamplingFields
from jaxllm.stages.fit import check_patterns
from jaxllm.stages.held_out import HeldOut
from jaxllm.stages.text_samples import text_samples
from jaxllm.stages.training_run import TrainingRun, train_in, work_directory
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.tokenizer import configured_tokenizer

# xz takes a second for 2 MB, and looks back this far.
_REFERENCE_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class PretrainConfig(ModelTrainingFields, SamplingFields):
    """A model trained on text from random parameters, or further from another run's, or from
    published weights."""

    stage: str = "pretrain"
    """Always `pretrain`."""
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    references: bool = True
    """Whether to measure gzip, xz and n-gram models on the held-out text, to compare with; left out
    beyond 64 MiB of held-out or 1 GiB of training text, and where not every token is predicted."""

    def __post_init__(self) -> None:
        ModelTrainingFields.__post_init__(self)
        SamplingFields.__post_init__(self)


def run(config: PretrainConfig, workdir: Path | None) -> None:
    """Prepares text and tokenizer, trains, evaluates, and writes samples, report and summary."""
    directory = work_directory(workdir)
    if config.init:
        model, path = model_to_continue(config.init, config.model, directory)
        tokenizer = dataclasses.replace(config.tokenizer, path=path)
        config = dataclasses.replace(config, model=model, tokenizer=tokenizer)
    train_in(directory, config, config.tokenizer, _check_model, _work)


def _work(run: TrainingRun[PretrainConfig]) -> dict[str, float]:
    """The run itself; its scores."""
    config = run.config
    corpus = run.corpus(config.data)
    model = architecture(config.model, corpus.tokenizer.vocab_size)
    rows = run.rows(config.data, corpus)
    objective = make_objective(model, config.objective, corpus.tokenizer)
    is_prefix = KINDS[config.objective.kind].prompt_is_prefix
    evaluation = HeldOut(
        config,
        config.data,
        corpus.eval,
        run.mesh,
        _measure(config, corpus, objective),
        text_samples(run, corpus.tokenizer, model, config.data.seq_len, is_prefix),
    )
    run.begin(corpus, rows)
    scores = run.train(
        rows,
        model,
        objective,
        evaluation,
        initial_params=None if config.init else run.random_params(model),
        predicted=KINDS[config.objective.kind].predicted(config.objective),
    )
    if not is_main():
        return {}
    scores = run.data_scores(corpus, rows) | scores
    every_token = KINDS[config.objective.kind].every_token
    if config.references and every_token and _affordable(corpus):
        scores |= _references(corpus)
    return scores


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
    check_patterns(config, with_pairs(config, param_shapes(model)))
    if KINDS[config.objective.kind].needs_mask and tokenizer.path:
        mask_id(configured_tokenizer(tokenizer))
    if not config.model.causal:
        print("the model sees both ways, and so cannot write: no samples", file=sys.stderr)


def _measure(
    config: PretrainConfig, corpus: Corpus, objective: Objective
) -> Callable[[Params, Params, Iterable[Batch]], dict[str, float]]:
    """Scores of parameters on held-out text."""
    evaluate = LossEvaluator(objective)
    every_token = KINDS[config.objective.kind].every_token

    def measure(params: Params, frozen: Params, batches: Iterable[Batch]) -> dict[str, float]:
        loss, predicted = evaluate(params, frozen, batches)["loss"]
        # Where only some batches are evaluated, all text is taken to have as many tokens a byte.
        if every_token:
            return text_scores(loss, corpus.eval)
        return {"eval/loss": loss, "eval/tokens": predicted}

    return measure


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
