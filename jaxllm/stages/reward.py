"""The `reward` stage: a tuned model and preferences in, a model that tells good responses out."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.cleaning import CleaningConfig
from jaxllm.data.config import DataConfig
from jaxllm.data.corpus import Corpus
from jaxllm.data.preferences import PreferenceKind, ResponseIds, response_ids
from jaxllm.data.split import HELD_OUT, TRAIN
from jaxllm.errors import UserError
from jaxllm.evaluation.loss import LossEvaluator
from jaxllm.evaluation.preferences import RatedRanking, calibration, preference_scores
from jaxllm.files import write_json
from jaxllm.inference.reward_model import RewardModel, load_reward_model
from jaxllm.models.config import HeadConfig, ModelConfig, TransformerConfig
from jaxllm.models.families import architecture
from jaxllm.models.transformer import check_length, param_shapes
from jaxllm.objectives.objective import Batch, Objective, Params
from jaxllm.objectives.reward import RewardLossConfig, reward
from jaxllm.reporting.samples import append_samples
from jaxllm.sharding.processes import is_main
from jaxllm.stages.fields import ModelTrainingFields
from jaxllm.stages.fit import check_patterns
from jaxllm.stages.held_out import HeldOut
from jaxllm.stages.training_run import (
    TrainingRun,
    model_to_continue,
    train_in,
    with_pairs,
    work_directory,
)
from jaxllm.tokenizers.chat_template import ChatTemplate, chat_template
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.tokenizer import Tokenizer, load_tokenizer

_SAMPLES = 3
_REFERENCES = 500  # preferred training responses whose mean reward becomes 0
_SHORTEST_ROW = 8  # two of a prompt's last token, a token of the response, and what ends it


@dataclasses.dataclass(frozen=True)
class RewardFields(RewardLossConfig):
    """How responses are laid out, and how their rewards are learnt."""

    template: str = ""
    """By which prompt and response are laid out: `bos_separated`, `chatml`, `llama3`, or a file
    with a Jinja template; empty: that by which `init` was tuned, else `bos_separated`."""


@dataclasses.dataclass(frozen=True)
class RewardConfig(ModelTrainingFields):
    """A model trained to tell which responses people prefer."""

    stage: str = "reward"
    """Always `reward`."""
    init: str = ""
    """Run directory or Hugging Face folder to take parameters, model and tokenizer from."""
    data: DataConfig = DataConfig(
        train="builtin:pydocs_preference",
        packing="best_fit",
        # What many prompts share would make copies of them.
        cleaning=CleaningConfig(near_duplicates=0.0),
    )
    reward: RewardFields = RewardFields()

    has_head: ClassVar[bool] = True
    random_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preference_data(self.data)
        if self.model.head.pooling != "last":
            raise ValueError("model.head.pooling: a reward is read at the last token; leave it out")

    @property
    def trained(self) -> str:
        # The head stands where the output matrix did, which would only decay.
        return f"(?!output)(?:{super().trained})"


def check_preference_data(data: DataConfig) -> None:
    """Checks that rankings can lie in rows as the data is packed.

    Raises:
        ValueError: they cannot.
    """
    if data.packing == "concat":
        raise ValueError(
            "data.packing: concat would cut rankings; take best_fit, or none to give each a row of "
            "its own"
        )
    if not data.document_mask:
        raise ValueError("data.document_mask: responses must not see each other; leave it True")
    if data.seq_len < _SHORTEST_ROW:
        raise ValueError(f"data.seq_len: {_SHORTEST_ROW} is the least that holds two responses")


def layout_of(tokenizer: Tokenizer, named: str, field: str) -> ChatTemplate:
    """The template by which prompts and responses are laid out.

    Raises:
        UserError: as `chat_template`.
    """
    own = "" if tokenizer.chat_template else "bos_separated"
    return chat_template(tokenizer, named or own, field)


def run(config: RewardConfig, workdir: Path | None) -> None:
    """Trains a head, and as much of the model below it as is asked for, on preferences, and writes
    how well they are told."""
    if not config.init:
        raise UserError(
            "config.init: give the run directory or Hugging Face folder of a trained model, as "
            "one of configs/sft.py."
        )
    directory = work_directory(workdir)
    if config.model.head.outputs:
        raise UserError("config.model.head.outputs: is one; leave it out.")
    model, path = model_to_continue(config.init, config.model, directory)
    config = dataclasses.replace(config, model=_with_head(model))
    train_in(directory, config, TokenizerConfig(path=path), _check, _work)


def _with_head(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, head=HeadConfig(1))


def _check(config: RewardConfig, tokenizer: TokenizerConfig) -> None:
    """Checks, before anything slow, that the model can be trained so.

    Raises:
        UserError: it cannot.
    """
    loaded = load_tokenizer(tokenizer.path)
    model = architecture(config.model, loaded.vocab_size)
    if not model.causal:
        raise UserError(
            "config.init: its model sees both ways (config.model.causal=False); rewards are read "
            "of one that writes."
        )
    check_length(model, config.data.seq_len, "config.data.seq_len")
    check_patterns(config, with_pairs(config, param_shapes(model)))
    layout_of(loaded, config.reward.template, "config.reward.template")


def _work(run: TrainingRun[RewardConfig]) -> dict[str, float]:
    """The run itself; its scores."""
    config = run.config
    # Of `init`, and not the run's own copy, which keeps the template that was found then.
    template = layout_of(
        load_tokenizer(run.tokenizer.path), config.reward.template, "config.reward.template"
    )
    corpus = run.corpus(config.data, PreferenceKind(template))
    # Kept with the run: whoever asks for rewards later lays responses out as it was trained.
    corpus.tokenizer.chat_template = template.source
    stores = (*corpus.train, corpus.eval)
    model = architecture(config.model, corpus.tokenizer.vocab_size)
    objective = reward(model, config.reward, max(store.most_parts for store in stores))
    rows = run.rows(config.data, corpus)
    evaluation = HeldOut(
        config,
        config.data,
        corpus.eval,
        run.mesh,
        _measure(objective),
        _samples(run, corpus, template, model),
    )
    run = dataclasses.replace(run, keeps_head=_is_reward_model(config.init))
    run.begin(corpus, rows)
    scores = run.train(rows, model, objective, evaluation)
    rated = _rated(run, corpus)
    if not is_main():
        return {}
    counts = {
        "data/truncated": float(sum(store.truncated for store in stores)),
        "data/dropped": float(sum(store.dropped for store in stores)),
    }
    return run.data_scores(corpus, rows) | scores | counts | rated


def _is_reward_model(init: str) -> bool:
    """Whether `init` has a head of the same kind, to be trained further."""
    path = RunDirectory(init).config_path
    return path.exists() and RunDirectory(init).config().get("stage") == "reward"


def _measure(objective: Objective) -> Callable[[Params, Params, Iterable[Batch]], dict[str, float]]:
    """Scores of parameters on held-out rankings."""
    evaluate = LossEvaluator(objective)

    def measure(params: Params, frozen: Params, batches: Iterable[Batch]) -> dict[str, float]:
        found = evaluate(params, frozen, batches)
        return {f"eval/{name}": found[name][0] for name in ("loss", "accuracy", "margin")}

    return measure


def _samples(
    run: TrainingRun[RewardConfig],
    corpus: Corpus,
    template: ChatTemplate,
    model: TransformerConfig,
) -> Callable[[int, Params], None]:
    """What writes the rewards of the responses to the first held-out prompts."""
    texts = itertools.islice(corpus.split.texts(HELD_OUT), _SAMPLES)
    shown = [json.loads(text) for text in texts]

    def write(step: int, params: Params) -> None:
        scorer = RewardModel(model, params, template, run.config.data.seq_len)
        found = iter(scorer.of_ids([ids for each in shown for ids in _laid_out(template, each)]))
        samples = []
        for ranking in shown:
            told = sorted(
                zip(ranking["scores"], ranking["responses"], strict=True), key=lambda x: -x[0]
            )
            rewards = dict(zip(ranking["responses"], found, strict=False))
            answers = (f"{rewards[text]:+.2f}  {text}" for _, text in told)
            samples.append((ranking["messages"][-1]["content"], "\n" + "\n".join(answers)))
        if is_main():
            append_samples(run.directory.samples, step, samples)

    return write


def _rated(run: TrainingRun[RewardConfig], corpus: Corpus) -> dict[str, float]:
    """Sets the mean reward of the training texts' preferred responses to 0, and tells how well
    held-out preferences are told."""
    with jax.set_mesh(run.mesh):
        scorer = dataclasses.replace(load_reward_model(run.directory.path, run.mesh), mean=0.0)
        best = [_best(json.loads(text)) for text in _spread_texts(corpus)]
        references = scorer([messages for messages, _ in best], [answer for _, answer in best])
        mean = sum(references) / len(references)
        held_out = [json.loads(text) for text in corpus.split.texts(HELD_OUT)]
        laid_out = [_laid_out(scorer.template, ranking) for ranking in held_out]
        rewards = iter(scorer.of_ids([ids for ranking in laid_out for ids in ranking]))
    rated = [
        RatedRanking(
            ranking["source"],
            ranking["scores"],
            [len(ids.response) for ids in responses],
            [next(rewards) - mean for _ in responses],
        )
        for ranking, responses in zip(held_out, laid_out, strict=True)
    ]
    if is_main():
        told = {"mean": mean, "references": len(references), "calibration": calibration(rated)}
        write_json(run.directory.rewards, told)
    return preference_scores(rated)


def _spread_texts(corpus: Corpus) -> Iterator[str]:
    """Training texts, spread over all of them."""
    count = sum(store.num_documents for store in corpus.train)
    stride = -(-count // _REFERENCES)
    return itertools.islice(corpus.split.texts(TRAIN), 0, None, stride)


def _best(ranking: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], str]:
    """What is asked, and the best response to it."""
    scores: Sequence[float] = ranking["scores"]
    return ranking["messages"], ranking["responses"][scores.index(max(scores))]


def _laid_out(template: ChatTemplate, ranking: Mapping[str, Any]) -> list[ResponseIds]:
    return response_ids(template, ranking["messages"], ranking["responses"])
