"""The `sft` stage: a trained model and conversations in, an assistant out."""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.checkpoints.load import model_config_of, tokenizer_path
from jaxllm.data.cleaning import CleaningConfig
from jaxllm.data.config import DataConfig
from jaxllm.data.corpus import Corpus, prepare_corpus
from jaxllm.data.examples import Examples, ExamplesConfig
from jaxllm.data.store import TokenStore
from jaxllm.evaluation.loss import LossEvaluator
from jaxllm.models.families import architecture
from jaxllm.objectives.cross_entropy import CrossEntropyConfig
from jaxllm.objectives.next_token import next_token
from jaxllm.objectives.objective import Batch, Objective, Params
from jaxllm.reporting.phases import Phases
from jaxllm.reporting.preview import Stretch, print_preview
from jaxllm.sharding.processes import is_main
from jaxllm.stages.answer_samples import AnsweringConfig, answer_samples
from jaxllm.stages.continued import check_init, check_writer, model_to_continue
from jaxllm.stages.held_out import HeldOut
from jaxllm.stages.training_run import TrainingRun, train_in, work_directory
from jaxllm.tokenizers.chat_template import Message
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class SftConfig(AnsweringConfig):
    """A model trained to answer, on instructions and conversations."""

    stage: str = "sft"
    """Always `sft`."""
    init: str = ""
    """Run directory or Hugging Face folder to take parameters, model and tokenizer from."""
    data: DataConfig = DataConfig(
        train="builtin:pydocs_instruct",
        packing="best_fit",
        # A system message, tools or an instruction that many share would make copies of them.
        cleaning=CleaningConfig(near_duplicates=0.0),
    )
    sft: ExamplesConfig = ExamplesConfig()
    objective: CrossEntropyConfig = CrossEntropyConfig()
    preview: int = 0
    """Show so many examples as the model would see them, and end; no work directory is needed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.packing == "concat":
            raise ValueError(
                "data.packing: concat would cut examples; take best_fit, or none to give each a "
                "row of its own"
            )
        if self.preview < 0:
            raise ValueError("preview: must not be negative")


def run(config: SftConfig, workdir: Path | None) -> None:
    """Makes examples of conversations, trains on their answers, and writes samples and report; or
    only shows some examples."""
    check_init(config.init, "configs/pretrain.py")
    if config.preview:
        preview(config)
        return
    directory = work_directory(workdir)
    model, path = model_to_continue(config.init, config.model, directory)
    config = dataclasses.replace(config, model=model)
    train_in(directory, config, TokenizerConfig(path=path), _check, _work)


def preview(config: SftConfig) -> None:
    """Prints the first examples, what of them is learnt, and what was cut or left out."""
    model_config_of(config.init)  # a wrong path is told as such
    if not is_main():
        return
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = TokenizerConfig(path=str(tokenizer_path(config.init)))
        corpus = prepare_corpus(config.data, tokenizer, Path(scratch), Phases(), kind=config.sft)
        shown = list(_shown(corpus.train, corpus.tokenizer, config.preview))
        print_preview(shown, _example_scores(corpus))


def _shown(
    stores: Sequence[TokenStore], tokenizer: Tokenizer, count: int
) -> Iterator[list[Stretch]]:
    """The first examples of the sources in turn, each as stretches that are learnt or not."""
    for number in range(count):
        store, place = stores[number % len(stores)], number // len(stores)
        if not store.shards or place >= store.shards[0].documents:
            continue
        begin, end = store.offsets(0)[place : place + 2]
        ids, trained = store.tokens(0)[begin:end].tolist(), store.trained(0)[begin:end].tolist()
        stretches: list[tuple[bool, list[int]]] = []
        for index, learnt in zip(ids, trained, strict=True):
            if not stretches or stretches[-1][0] != learnt:
                stretches.append((learnt, []))
            stretches[-1][1].append(index)
        yield [
            Stretch(tokenizer.decode(part, skip_special_tokens=False), learnt)
            for learnt, part in stretches
        ]


def _check(config: SftConfig, tokenizer: TokenizerConfig) -> None:
    """Checks, before anything slow, that the model can be trained so.

    Raises:
        UserError: it cannot.
    """
    loaded = load_tokenizer(tokenizer.path)
    check_writer(config, config.data, loaded)
    config.sft.encoder(loaded, config.data.seq_len)


def _work(run: TrainingRun[SftConfig]) -> dict[str, float]:
    """The run itself; its scores."""
    config = run.config
    corpus = run.corpus(config.data, config.sft)
    assert isinstance(corpus.encoder, Examples)
    # Kept with the run: whoever speaks to the model later does it as it was trained.
    corpus.tokenizer.chat_template = corpus.encoder.template.source
    model = architecture(config.model, corpus.tokenizer.vocab_size)
    rows = run.rows(config.data, corpus)
    objective = next_token(model, config.objective)
    evaluation = HeldOut(
        config,
        config.data,
        corpus.eval,
        run.mesh,
        _measure(objective),
        answer_samples(run, corpus, corpus.encoder.template, model, config.data.seq_len, opening),
    )
    run.begin(corpus, rows)
    scores = run.train(rows, model, objective, evaluation)
    if not is_main():
        return {}
    return run.data_scores(corpus, rows) | _example_scores(corpus) | scores


def _measure(objective: Objective) -> Callable[[Params, Params, Iterable[Batch]], dict[str, float]]:
    """Scores of parameters on held-out answers."""
    evaluate = LossEvaluator(objective)

    def measure(params: Params, frozen: Params, batches: Iterable[Batch]) -> dict[str, float]:
        loss, _ = evaluate(params, frozen, batches)["loss"]
        return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}

    return measure


def opening(record: Mapping[str, Any]) -> list[Message]:
    """The messages before the first answer; of a text, none."""
    messages = record.get("messages", [])
    roles = [message["role"] for message in messages]
    return messages[: roles.index("assistant")] if messages else []


def _example_scores(corpus: Corpus) -> dict[str, float]:
    """How many examples there are, and what was cut or left out of them."""
    stores = (*corpus.train, corpus.eval)
    return {
        "data/trained_tokens": float(sum(store.num_predicted for store in corpus.train)),
        "data/truncated": float(sum(store.truncated for store in stores)),
        "data/dropped": float(sum(store.dropped for store in stores)),
    }
