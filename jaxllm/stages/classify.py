"""The `classify` stage: a trained model and labelled texts in, a classifier out."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

import jax

from jaxllm.checkpoints.load import model_config_of
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.conversion.configuration import is_published
from jaxllm.data.cleaning import CleaningConfig
from jaxllm.data.config import DataConfig
from jaxllm.data.corpus import Corpus
from jaxllm.data.labels import Class, LabelledKind, LabelledTexts, Labels, LabelsConfig
from jaxllm.data.split import HELD_OUT, TRAIN
from jaxllm.errors import UserError
from jaxllm.evaluation.classification import (
    ClassificationEvaluator,
    classification_scores,
    told,
)
from jaxllm.evaluation.fewshot import parse_shots
from jaxllm.evaluation.items import Item
from jaxllm.evaluation.label_prompts import WAYS, Labelled, asked_labels, label_items, way_scores
from jaxllm.evaluation.tasks import spread
from jaxllm.evaluation.text_model import TrainedTextModel
from jaxllm.files import write_json
from jaxllm.inference.classifier import Classifier, load_classifier
from jaxllm.inference.trained import load_trained
from jaxllm.models.config import HeadConfig, ModelConfig, TransformerConfig
from jaxllm.models.families import architecture
from jaxllm.models.transformer import check_length, param_shapes
from jaxllm.objectives.classification import ClassificationConfig, classification
from jaxllm.objectives.objective import Batch, Params
from jaxllm.reporting.samples import append_samples
from jaxllm.sharding.processes import is_main
from jaxllm.stages.continued import check_init, model_to_continue, with_pairs
from jaxllm.stages.fields import ModelTrainingFields
from jaxllm.stages.fit import check_patterns
from jaxllm.stages.held_out import HeldOut
from jaxllm.stages.training_run import TrainingRun, train_in, work_directory
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.tokenizer import load_tokenizer

_SAMPLES = 4
_POOL = 1000  # texts that examples are chosen from
_SHORTEST_ROW = 3  # bos, a token, eos


@dataclasses.dataclass(frozen=True)
class ClassifyFields(LabelsConfig, ClassificationConfig):
    """What is told of texts, how it is learnt, and what it is compared with."""

    prompting: str = ""
    """Numbers of examples, as `0,4`: `init` itself, as it was before, is also asked for the labels
    of held-out texts behind so many examples, by the likelihood of each label and in writing, and
    all ways stand in one table. Empty: it is not."""
    prompting_texts: int = 200
    """Held-out texts of that table at most, spread evenly over all; 0: all."""

    def __post_init__(self) -> None:
        LabelsConfig.__post_init__(self)
        ClassificationConfig.__post_init__(self)
        if self.prompting_texts < 0:
            raise ValueError("prompting_texts: must not be negative")
        if parse_shots(self.prompting, "prompting") and self.kind != "single_label":
            raise ValueError(f"prompting: is for single_label, and not for {self.kind}")
        if self.kind == "regression" and self.class_weights.strip():
            raise ValueError("class_weights: regression has no classes; leave it out")
        if self.kind == "multi_label" and self.class_weights.strip() == "balanced":
            raise ValueError(
                "class_weights: balanced is for single_label; of multi_label all classes count "
                "the same already"
            )


@dataclasses.dataclass(frozen=True)
class ClassifyConfig(ModelTrainingFields):
    """A model trained to tell what texts are."""

    stage: str = "classify"
    """Always `classify`."""
    init: str = ""
    """Run directory or Hugging Face folder to take parameters, model and tokenizer from."""
    data: DataConfig = DataConfig(
        train="builtin:pydocs_classify",
        eval_fraction=0.2,
        packing="best_fit",
        # Short texts resemble each other without being copies.
        cleaning=CleaningConfig(near_duplicates=0.0),
    )
    classify: ClassifyFields = ClassifyFields()

    has_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.packing == "concat":
            raise ValueError(
                "data.packing: concat would cut texts; take best_fit, or none to give each a row "
                "of its own"
            )
        if not self.data.document_mask:
            raise ValueError("data.document_mask: texts must not see each other; leave it True")
        if self.data.seq_len < _SHORTEST_ROW:
            raise ValueError(f"data.seq_len: {_SHORTEST_ROW} is the least that holds a text")

    @property
    def trained(self) -> str:
        # The head stands where the output matrix did, which would only decay.
        return f"(?!output)(?:{super().trained})"


def run(config: ClassifyConfig, workdir: Path | None) -> None:
    """Trains a head, and as much of the model below it as is asked for, and writes how well texts
    are told apart."""
    check_init(config.init, "configs/pretrain.py")
    if config.classify.prompting:
        model_config_of(config.init)  # it is wanted at the end again
    directory = work_directory(workdir)
    if config.model.head.outputs:
        raise UserError("config.model.head.outputs: follows from the labels; leave it out.")
    model, path = model_to_continue(config.init, config.model, directory)
    model = _with_outputs(model, _outputs_so_far(directory))
    config = dataclasses.replace(config, model=model)
    train_in(directory, config, TokenizerConfig(path=path), _check, _work)


def _outputs_so_far(directory: RunDirectory) -> int:
    """The outputs of the head of a run that has begun; else 0, until the labels are known."""
    if not directory.config_path.exists():
        return 0
    return model_config_of(directory.path).head.outputs


def _with_outputs(model: ModelConfig, outputs: int) -> ModelConfig:
    return dataclasses.replace(model, head=HeadConfig(outputs, model.head.pooling))


def _check(config: ClassifyConfig, tokenizer: TokenizerConfig) -> None:
    """Checks, before anything slow, that the model can be trained so.

    Raises:
        UserError: it cannot.
    """
    loaded = load_tokenizer(tokenizer.path)
    model = architecture(_with_outputs(config.model, 1), loaded.vocab_size)
    check_length(model, config.data.seq_len, "config.data.seq_len")
    if config.classify.prompting and not model.causal:
        raise UserError(
            "config.classify.prompting: the model of config.init sees both ways "
            "(config.model.causal=False), and cannot be asked; leave it out."
        )
    check_patterns(config, with_pairs(config, param_shapes(model)))


def _work(run: TrainingRun[ClassifyConfig]) -> dict[str, float]:
    """The run itself; its scores."""
    config = run.config
    corpus = run.corpus(config.data, LabelledKind(config.classify))
    assert isinstance(corpus.encoder, LabelledTexts)
    labels = corpus.encoder.labels
    model_config = _with_outputs(config.model, labels.outputs)
    run = dataclasses.replace(run, config=dataclasses.replace(config, model=model_config))
    model = architecture(model_config, corpus.tokenizer.vocab_size)
    weights = config.classify.weights(labels.names, labels.counts, labels.texts)
    objective = classification(model, labels.kind, corpus.encoder.targets, weights)
    rows = run.rows(config.data, corpus)
    evaluation = HeldOut(
        config,
        config.data,
        corpus.eval,
        run.mesh,
        _measure(run, corpus.encoder, model),
        _samples(run, corpus, labels, model),
    )
    shots = max(parse_shots(config.classify.prompting, "prompting"), default=0)
    pool = -(-labels.texts // _stride(labels))
    if shots > pool:
        raise UserError(
            f"config.classify.prompting: {shots} examples are asked for, and are chosen from "
            f"{pool:,} training texts; ask for fewer."
        )
    if _tells_the_same(config.init, labels, model_config.head):
        run = dataclasses.replace(run, keeps_head=True)
    run.begin(corpus, rows)
    if is_main():
        labels.save(run.directory.labels)
        _print_labels(labels)
    scores = run.train(rows, model, objective, evaluation)
    ways = _ways(run, corpus, labels)
    if not is_main():
        return {}
    scores |= ways
    stores = (*corpus.train, corpus.eval)
    scores["data/truncated"] = float(sum(store.truncated for store in stores))
    return run.data_scores(corpus, rows) | scores


def _tells_the_same(init: str, labels: Labels, head: HeadConfig) -> bool:
    """Whether `init` has a head for the same classes, to be trained further."""
    if is_published(init):
        return False
    path = RunDirectory(init).labels
    if not path.exists():
        return False
    known = Labels.load(path)
    same = (known.kind, known.names) == (labels.kind, labels.names)
    return same and model_config_of(init).head == head


def _measure(
    run: TrainingRun[ClassifyConfig],
    encoder: LabelledTexts,
    model: TransformerConfig,
) -> Callable[[Params, Params, Iterable[Batch]], dict[str, float]]:
    """Scores of parameters on held-out texts; those of each class are kept in a file."""
    count = ClassificationEvaluator(model, encoder.labels.kind, encoder.targets)

    def measure(params: Params, frozen: Params, batches: Iterable[Batch]) -> dict[str, float]:
        counts = count(params, frozen, batches)
        if is_main() and encoder.labels.names:
            write_json(run.directory.classes, told(counts, encoder.labels))
        return classification_scores(counts, encoder.labels)

    return measure


def _samples(
    run: TrainingRun[ClassifyConfig], corpus: Corpus, labels: Labels, model: TransformerConfig
) -> Callable[[int, Params], None]:
    """What writes how the first held-out texts are classified."""
    shown: list[tuple[str, str]] = []
    for text in corpus.split.texts(HELD_OUT):
        record = json.loads(text)
        shown.append((record["text"], _said(record["label"])))
        if len(shown) == _SAMPLES:
            break

    def write(step: int, params: Params) -> None:
        seq_len = run.config.data.seq_len
        classify = Classifier(model, params, corpus.tokenizer, labels, seq_len, len(shown))
        predictions = classify([text for text, _ in shown])
        if is_main():
            samples = []
            for (text, label), found in zip(shown, predictions, strict=True):
                sure = max(found.probabilities.values(), default=None)
                share = f" ({sure:.0%})" if labels.kind == "single_label" and sure else ""
                samples.append((text, f"\n→ {_said(found.label)}{share}; is {label}"))
            append_samples(run.directory.samples, step, samples)

    return write


def _ways(run: TrainingRun[ClassifyConfig], corpus: Corpus, labels: Labels) -> dict[str, float]:
    """The trained head, and `init` as it is asked for labels, on the same held-out texts."""
    config = run.config
    shots = parse_shots(config.classify.prompting, "prompting")
    if not shots:
        return {}
    texts = [_labelled(text) for text in corpus.split.texts(HELD_OUT)]
    texts = list(spread(texts, config.classify.prompting_texts))
    items = label_items(texts, labels.names)
    with jax.set_mesh(run.mesh):
        classify = load_classifier(run.directory.path, run.mesh)
        found = classify([text for text, _ in texts])
        places = [labels.names.index(each.label) for each in found]
        ways = {"trained head": way_scores(places, items, labels)}
        del classify  # two models need not be there at once
        model = TrainedTextModel(load_trained(config.init, run.mesh), report=run.phases)
        pool = _pool(corpus, labels) if any(shots) else []
        for way, number in itertools.product(WAYS, shots):
            name = f"{way}, {number} example{'' if number == 1 else 's'}"
            asked = asked_labels(model, items, pool, way, number, config.seed)
            ways[name] = way_scores(asked.places, items, labels) | {"cut": asked.cut}
    return {
        f"classify/{name}/{score}": value
        for name, scores in ways.items()
        for score, value in scores.items()
    }


def _pool(corpus: Corpus, labels: Labels) -> list[Item]:
    """Training texts to take examples from: every so-many-th, as one source may be sorted."""
    texts = itertools.islice(corpus.split.texts(TRAIN), 0, None, _stride(labels))
    return label_items([_labelled(text) for text in texts], labels.names)


def _stride(labels: Labels) -> int:
    """Every so-many-th training text may become an example."""
    return -(-labels.texts // _POOL)


def _labelled(text: str) -> Labelled:
    record = json.loads(text)
    return Labelled(record["text"], record["label"])


def _said(label: Class | float | Iterable[Class]) -> str:
    if isinstance(label, float):
        return f"{label:.4g}"
    return str(label) if isinstance(label, int | str) else ", ".join(map(str, label)) or "nothing"


def _print_labels(labels: Labels) -> None:
    counts = zip(labels.names, labels.counts, strict=True)
    told = ", ".join(f"{name} {count:,}" for name, count in counts)
    if labels.kind == "regression":
        told = f"mean {labels.mean:.4g}, standard deviation {labels.deviation:.4g}"
    print(f"labels of {labels.texts:,} training texts: {told}", file=sys.stderr)
