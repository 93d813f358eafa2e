"""The `evaluate` stage: a model measured on text, by its training's objective, and on tasks."""

import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxllm import config as configuration
from jaxllm.checkpoints.load import model_config_of, tokenizer_path
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.conversion.configuration import is_published
from jaxllm.data.batches import EvalBatches
from jaxllm.data.config import DataConfig
from jaxllm.data.corpus import DocumentKind, WholeTexts, prepare_corpus, prepare_text
from jaxllm.data.documents import RejectedLines
from jaxllm.data.examples import ExamplesConfig
from jaxllm.data.labels import LabelledKind, LabelledTexts, Labels
from jaxllm.data.packing import packed_rows
from jaxllm.data.store import TokenStore
from jaxllm.errors import UserError
from jaxllm.evaluation.classification import (
    ClassificationEvaluator,
    classification_scores,
    texts_of,
)
from jaxllm.evaluation.contamination import ContaminationConfig, TaskContamination
from jaxllm.evaluation.loss import LossEvaluator, text_scores
from jaxllm.evaluation.suite import (
    PreparedTask,
    TasksConfig,
    item_lines,
    look_for,
    measure,
    prepare,
)
from jaxllm.evaluation.suite import scores as suite_scores
from jaxllm.evaluation.text_model import TrainedTextModel
from jaxllm.files import write_atomically
from jaxllm.inference.classifier import labels_config_of
from jaxllm.inference.trained import TrainedModel, load_trained
from jaxllm.models.families import architecture
from jaxllm.models.transformer import check_length
from jaxllm.objectives.pretraining import KINDS, make_objective
from jaxllm.reporting.phases import Phases
from jaxllm.reporting.report import write_report
from jaxllm.reporting.tables import print_summary
from jaxllm.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from jaxllm.sharding.processes import check_shared, is_main, main_first
from jaxllm.stages.data_scores import reading_scores
from jaxllm.tokenizers.chat_template import chat_template
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.tokenizer import load_tokenizer

REJECTED_ITEMS_FILE = "rejected_items.jsonl"


@dataclasses.dataclass(frozen=True)
class EvaluateDataConfig:
    """The text to measure on; what is not here is as in the run's training."""

    eval: str = ""
    """Sources of text, separated by commas; empty: what the run held out, unless there are
    tasks."""
    seq_len: int = 0
    """Tokens in a row, and of the prompt of a task with what follows it; 0: as the model was
    trained, or made for."""
    max_bad_fraction: float = 0.01
    """Stop when more than this share of the lines of a source, or of a task, is bad."""
    parse_special_tokens: bool = True
    """Read each `<s>…</s>` span of a record as a document of its own."""
    store: str = ""
    """Folder for tokenised text; empty: inside the work directory, if there is one."""

    def __post_init__(self) -> None:
        if self.seq_len < 0:
            raise ValueError("seq_len: must not be negative")


@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """A second model, or the same one prompted otherwise, measured on the same items."""

    init: str = ""
    """Run directory or Hugging Face folder of the second model; empty: that of `init`, where
    `fewshot` is given."""
    fewshot: int = -1
    """Examples before each of its questions; -1: as many as `fewshot` says."""

    def __post_init__(self) -> None:
        if self.fewshot < -1:
            raise ValueError("fewshot: must not be negative, but for -1: as many as fewshot says")

    @property
    def wanted(self) -> bool:
        """Whether there is anything to compare with."""
        return bool(self.init) or self.fewshot >= 0


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(TasksConfig):
    """A trained model measured on text, by the objective of its training, and on tasks."""

    stage: str = "evaluate"
    """Always `evaluate`."""
    init: str = ""
    """Run directory or Hugging Face folder whose model is measured."""
    data: EvaluateDataConfig = EvaluateDataConfig()
    baseline: BaselineConfig = BaselineConfig()
    contamination: ContaminationConfig = ContaminationConfig()
    chat: bool = False
    """Put each prompt to the model as the message of a user, by its tokenizer's chat template."""
    batch_size: int = 32
    """Rows at once, over all devices."""
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError("batch_size: must be at least 1")


def run(config: EvaluateConfig, workdir: Path | None) -> None:
    """Prints the scores; with a work directory, writes `config.json`, `summary.json`, and of tasks
    `items.jsonl` and `report.html` too. What the first model gave is written before the baseline is
    measured."""
    if not config.init:
        raise UserError("config.init: give the run directory or Hugging Face folder of a model.")
    model_config_of(config.init)  # a wrong path is told before anything is made
    directory = None if workdir is None else RunDirectory(workdir)
    if directory is not None:
        with main_first():
            directory.open(dataclasses.asdict(config), dataclasses.asdict(EvaluateConfig()))
        check_shared(directory.path, "--workdir")
    mesh = make_mesh(config.mesh)
    scores: dict[str, float] = {}
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as scratch:
        folder = workdir or Path(scratch)
        # What is wrong with the tasks or the second model is told before the first is loaded.
        prepared = _prepared(config, folder if is_main() else Path(scratch))
        if prepared:
            _check_models(config)
        looked = look_for(prepared, config.contamination, config.data.max_bad_fraction)
        trained = load_trained(config.init, mesh)
        if config.data.eval or not prepared:
            scores |= held_out_scores(config, trained, folder)
        if prepared:
            for found, lines in task_scores(config, prepared, trained, looked):
                scores |= found
                _keep(config, directory, scores, lines)
        else:
            _keep(config, directory, scores, [])
    print_summary(scores)


def task_scores(
    config: EvaluateConfig,
    prepared: list[PreparedTask],
    trained: TrainedModel,
    contamination: Mapping[str, TaskContamination],
) -> Iterator[tuple[dict[str, float], list[str]]]:
    """The scores of the tasks and the lines of all items; and if there is a baseline, once more
    with what it gives."""
    model = _text_model(config, trained)
    results = measure(prepared, model, config.shots())
    lines = list(item_lines(prepared, results, config.init, contamination))
    found = suite_scores(results, None, contamination)
    if any(value for name, value in found.items() if name.endswith("/cut")):
        print(
            f"Some prompts lost their beginning: the model reads {model.limit:,} tokens at once. "
            "The column `cut prompts` tells their share.",
            file=sys.stderr,
        )
    yield found, lines
    if config.baseline.wanted:
        init = config.baseline.init or config.init
        shots = config.shots() if config.baseline.fewshot < 0 else (config.baseline.fewshot,)
        mesh = jax.sharding.get_mesh()
        other = trained if init == config.init else load_trained(init, mesh)
        baseline = measure(prepared, _text_model(config, other), shots)
        lines += item_lines(prepared, baseline, f"baseline: {init}", contamination)
        yield suite_scores(results, baseline, contamination), lines


def held_out_scores(
    config: EvaluateConfig, trained: TrainedModel, folder: Path
) -> dict[str, float]:
    """The scores on `data.eval`, or on the text that the run held out.

    Raises:
        UserError: the model comes without held-out text, and there is none in the configuration.
    """
    recorded = _recorded_data(config.init)
    if recorded is None and not config.data.eval:
        raise UserError(
            f"config.init: {config.init} has weights and no text that was held out; give some to "
            "measure on, as --config.data.eval=my_text.jsonl, or tasks (config.tasks)."
        )
    trained_on = configuration.from_dict(DataConfig, recorded or {}, "data")
    seq_len = trained_on.seq_len if recorded else trained.loaded.context or trained_on.seq_len
    data = dataclasses.replace(trained_on, seq_len=config.data.seq_len or seq_len)
    check_length(trained.loaded.model, data.seq_len, "config.data.seq_len")
    phases, kind = Phases(), _recorded_kind(config.init)
    if config.data.eval:
        given = dataclasses.asdict(config.data) | {"seq_len": data.seq_len}
        data = dataclasses.replace(data, **given)
        with main_first():
            prepared = prepare_text(data, trained.loaded.tokenizer, folder, phases, kind)
        store, split, encoder = prepared
    else:
        source = RunDirectory(config.init)
        tokenizer = TokenizerConfig(path=str(source.tokenizer))
        with main_first():
            corpus = prepare_corpus(data, tokenizer, source.path, phases, source.data(), kind)
        store, split, encoder = corpus.eval, corpus.split, corpus.encoder
    rows = packed_rows(store, data.packing, data.seq_len, data.document_mask)
    batches = EvalBatches(rows, config.batch_size, batch_sharding(jax.sharding.get_mesh()))
    if isinstance(encoder, LabelledTexts):
        scores = _classification_scores(trained, encoder, batches)
    else:
        scores = _text_scores(trained, store, batches)
    return scores | reading_scores(split)


def _keep(
    config: EvaluateConfig,
    directory: RunDirectory | None,
    scores: Mapping[str, float],
    lines: list[str],
) -> None:
    """Writes what has been measured so far, if there is a work directory."""
    if directory is None or not is_main():
        return
    directory.begin(dataclasses.asdict(config))
    directory.write_summary(scores)
    if lines:
        write_atomically(directory.items, "".join(lines))
        write_report(directory.path)


def _check_models(config: EvaluateConfig) -> None:
    """What can be told of the models from their configurations and tokenizers alone.

    Raises:
        UserError: there is no model at a path, its tokenizer cannot be read or has no chat
            template, or `data.seq_len` is more than it is made for.
    """
    for init in filter(None, dict.fromkeys((config.init, config.baseline.init))):
        recorded = model_config_of(init)
        tokenizer = load_tokenizer(tokenizer_path(init))
        model = architecture(recorded, tokenizer.vocab_size)
        if config.chat:
            chat_template(tokenizer)
        if config.data.seq_len:
            check_length(model, config.data.seq_len, "config.data.seq_len")


def _recorded_data(init: str) -> dict[str, Any] | None:
    """What the model at `init` was trained on, as its run recorded it; of others, None."""
    if is_published(init):
        return None
    recorded = RunDirectory(init).config().get("data")
    return recorded if isinstance(recorded, dict) else None


def _recorded_kind(init: str) -> DocumentKind:
    """What the model at `init` was trained on: labelled texts, conversations, or text."""
    if is_published(init):
        return WholeTexts()
    config = RunDirectory(init).config()
    recorded = config.get("classify")
    if isinstance(recorded, dict):
        run = RunDirectory(init)
        return LabelledKind(labels_config_of(run), Labels.load(run.labels))
    recorded = config.get("sft")
    if not isinstance(recorded, dict):
        return WholeTexts()
    # The run keeps its template with its tokenizer.
    return configuration.from_dict(ExamplesConfig, recorded | {"template": ""}, "sft")


def _text_model(config: EvaluateConfig, trained: TrainedModel) -> TrainedTextModel:
    loaded = trained.loaded
    if config.data.seq_len:
        check_length(loaded.model, config.data.seq_len, "config.data.seq_len")
        loaded = loaded._replace(context=config.data.seq_len)
    return TrainedTextModel(
        dataclasses.replace(trained, loaded=loaded, slots=config.batch_size),
        config.batch_size,
        template=chat_template(trained.loaded.tokenizer) if config.chat else None,
        report=Phases(),
    )


def _prepared(config: EvaluateConfig, folder: Path) -> list[PreparedTask]:
    if not config.tasks.strip(", "):
        return []
    shots = max(*config.shots(), config.baseline.fewshot)
    with RejectedLines(folder / REJECTED_ITEMS_FILE) as rejected:
        return prepare(config, shots, config.data.max_bad_fraction, rejected)


def _classification_scores(
    trained: TrainedModel, encoder: LabelledTexts, batches: EvalBatches
) -> dict[str, float]:
    """How well the head of a run of `classify` tells texts."""
    model, params = trained.loaded.model, trained.loaded.params
    count = ClassificationEvaluator(model, encoder.labels.kind, encoder.targets)
    counts = count(params, {}, batches)
    return classification_scores(counts, encoder.labels) | {"eval/texts": texts_of(counts)}


def _text_scores(
    trained: TrainedModel, store: TokenStore, batches: EvalBatches
) -> dict[str, float]:
    loaded, objective = trained.loaded, trained.objective
    evaluate = LossEvaluator(make_objective(loaded.model, objective, loaded.tokenizer))
    loss, tokens = evaluate(loaded.params, {}, batches)["loss"]
    scores = {"eval/loss": loss, "eval/tokens": tokens}
    if store.masked:  # answers alone are predicted, whose bytes nobody has counted
        return scores
    scores["eval/bytes"] = float(store.num_bytes)
    if KINDS[objective.kind].every_token:
        scores |= text_scores(loss, store) | {"eval/tokens": float(store.num_predicted)}
    return scores
