"""The `reward` stage: a tuned model and preferences in, a model that tells good responses out."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax

from jaxllm.checkpoints.load import load_model
from jaxllm.data.cleaning import CleaningConfig
from jaxllm.data.config import DataConfig
from jaxllm.data.corpus import Corpus
from jaxllm.data.rankings import (
    PreferenceKind,
    Rankings,
    ResponseIds,
    check_preference_data,
    layout_of,
)
from jaxllm.data.split import HELD_OUT, TRAIN
from jaxllm.errors import UserError
from jaxllm.evaluation.loss import LossEvaluator
from jaxllm.evaluation.preferences import RatedRanking, calibration, preference_scores
from jaxllm.files import write_json
from jaxllm.inference.reward_model import RewardModel, is_reward_model
from jaxllm.models.config import HeadConfig, ModelConfig, TransformerConfig
from jaxllm.models.families import architecture
from jaxllm.objectives.objective import Batch, Objective, Params
from jaxllm.objectives.reward import RewardLossConfig, reward
from jaxllm.reporting.samples import append_samples
from jaxllm.sharding.processes import is_main
from jaxllm.stages.continued import check_init, check_writer, model_to_continue
from jaxllm.stages.fields import ModelTrainingFields
from jaxllm.stages.held_out import HeldOut
from jaxllm.stages.training_run import TrainingRun, train_in, work_directory
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.tokenizer import load_tokenizer

_SAMPLES = 3
_REFERENCES = 500  # preferred training responses whose mean reward becomes 0


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


def run(config: RewardConfig, workdir: Path | None) -> None:
    """Trains a head, and as much of the model below it as is asked for, on preferences, and writes
    how well they are told."""
    check_init(config.init, "configs/sft.py")
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
    check_writer(config, config.data, loaded)
    layout_of(loaded, config.reward.template, "config.reward.template")


def _work(run: TrainingRun[RewardConfig]) -> dict[str, float]:
    """The run itself; its scores."""
    config = run.config
    # In later lives the run's own copy, which has the template that was found in the first.
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
        _samples(run, corpus, model),
    )
    run = dataclasses.replace(run, keeps_head=is_reward_model(config.init))
    run.begin(corpus, rows)
    if is_main():
        run.directory.rewards.unlink(missing_ok=True)  # of an earlier life, with other parameters
    scores = run.train(rows, model, objective, evaluation)
    rated = _rated(run, corpus)
    if not is_main():
        return {}
    counts = {
        "data/truncated": float(sum(store.truncated for store in stores)),
        "data/dropped": float(sum(store.dropped for store in stores)),
    }
    return run.data_scores(corpus, rows) | scores | counts | rated


def _measure(objective: Objective) -> Callable[[Params, Params, Iterable[Batch]], dict[str, float]]:
    """Scores of parameters on held-out rankings."""
    evaluate = LossEvaluator(objective)

    def measure(params: Params, frozen: Params, batches: Iterable[Batch]) -> dict[str, float]:
        found = evaluate(params, frozen, batches)
        return {f"eval/{name}": found[name][0] for name in ("loss", "accuracy", "margin")}

    return measure


def _samples(
    run: TrainingRun[RewardConfig], corpus: Corpus, model: TransformerConfig
) -> Callable[[int, Params], None]:
    """What writes the rewards of the responses to the first held-out prompts."""
    encoder = corpus.encoder
    assert isinstance(encoder, Rankings)
    shown = list(itertools.islice(_laid_out(encoder, corpus, HELD_OUT), _SAMPLES))

    def write(step: int, params: Params) -> None:
        scorer = RewardModel(model, params, encoder.template, run.config.data.seq_len)
        rewards = iter(scorer.of_ids([ids for each in shown for ids in each.responses]))
        samples = []
        for each in shown:
            told = zip(each.ranking["scores"], each.ranking["responses"], strict=True)
            answers = [(score, f"{next(rewards):+.2f}  {text}") for score, text in told]
            answers.sort(key=lambda answer: -answer[0])
            asked = each.ranking["messages"][-1]["content"]
            samples.append((asked, "\n" + "\n".join(text for _, text in answers)))
        if is_main():
            append_samples(run.directory.samples, step, samples)

    return write


class _Ranking(NamedTuple):
    """A ranking as it lies in a row."""

    ranking: dict[str, Any]
    """As it was read."""
    responses: list[ResponseIds]


def _laid_out(encoder: Rankings, corpus: Corpus, side: int, stride: int = 1) -> Iterator[_Ranking]:
    """The rankings of one side, every so-many-th, that rows hold."""
    for text in itertools.islice(corpus.split.texts(side), 0, None, stride):
        ranking = json.loads(text)
        if fitted := encoder.fitted(ranking):
            yield _Ranking(ranking, fitted.responses)


def _rated(run: TrainingRun[RewardConfig], corpus: Corpus) -> dict[str, float]:
    """Sets the mean reward of the training texts' preferred responses to 0, and tells how well
    held-out preferences are told."""
    config, encoder = run.config, corpus.encoder
    assert isinstance(encoder, Rankings)
    texts = sum(store.num_documents for store in corpus.train)
    trained = _laid_out(encoder, corpus, TRAIN, -(-texts // _REFERENCES))
    best = [each.responses[_best(each.ranking["scores"])] for each in trained]
    held_out = list(_laid_out(encoder, corpus, HELD_OUT))
    with jax.set_mesh(run.mesh):
        # Not by what an earlier life of the run may have left.
        loaded = load_model(run.directory.path, run.mesh)
        rows = config.batch_size // config.micro_batches
        scorer = RewardModel(
            loaded.model, loaded.params, encoder.template, config.data.seq_len, batch_size=rows
        )
        references = scorer.of_ids(best)
        mean = sum(references) / len(references)
        rewards = iter(scorer.of_ids([ids for each in held_out for ids in each.responses]))
    rated = [
        RatedRanking(
            each.ranking["source"],
            each.ranking["scores"],
            [len(ids.response) for ids in each.responses],
            [next(rewards) - mean for _ in each.responses],
        )
        for each in held_out
    ]
    if is_main():
        told = {"mean": mean, "references": len(references), "calibration": calibration(rated)}
        write_json(run.directory.rewards, told)
    return preference_scores(rated)


def _best(scores: Sequence[float]) -> int:
    return scores.index(max(scores))
