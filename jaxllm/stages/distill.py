"""The `distill` stage: a teacher and text or conversations in, a smaller model like it out."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from jaxllm.checkpoints.load import tokenizer_path
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.config import DataConfig
from jaxllm.data.corpus import Corpus, DocumentKind, WholeTexts
from jaxllm.data.examples import Examples, ExamplesConfig
from jaxllm.data.rows import TokenRows
from jaxllm.data.store import TokenStore
from jaxllm.data.training_rows import Beside
from jaxllm.evaluation.loss import LossEvaluator, text_scores
from jaxllm.models.config import TransformerConfig
from jaxllm.models.families import architecture
from jaxllm.models.transformer import check_length
from jaxllm.objectives.distillation import TEACHER_TREE, distillation
from jaxllm.objectives.matching import Matching, MatchingConfig, init_projections
from jaxllm.objectives.objective import Batch, Objective, Params
from jaxllm.ops.divergence import DivergenceConfig
from jaxllm.sharding.processes import is_main
from jaxllm.stages.answer_samples import AnsweringConfig, answer_samples
from jaxllm.stages.continued import check_writer, model_to_continue
from jaxllm.stages.data_scores import data_scores
from jaxllm.stages.fields import SamplingFields
from jaxllm.stages.held_out import HeldOut, WriteSamples
from jaxllm.stages.sft import opening
from jaxllm.stages.student import (
    PrunedStartFields,
    beginning,
    beside_the_teacher,
    model_of_part,
    student_of,
)
from jaxllm.stages.student_rollouts import OnPolicyFields, beginnings_of, student_stream
from jaxllm.stages.teacher import (
    Teacher,
    TeacherFields,
    check_teacher,
    teacher_place,
)
from jaxllm.stages.text_samples import text_samples
from jaxllm.stages.training_run import TrainingRun, train_in, work_directory
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.tokenizer import load_tokenizer

RECORDS = ("text", "conversations")


@dataclasses.dataclass(frozen=True)
class DistillFields(DivergenceConfig, MatchingConfig, PrunedStartFields, OnPolicyFields):
    """What is learnt of the teacher, and on which texts."""

    records: str = "text"
    """How `data` is read: `text`, as `pretrain` does, of which every token is learnt; or
    `conversations`, as `sft` does by the fields of that name, of which answers are."""

    def __post_init__(self) -> None:
        DivergenceConfig.__post_init__(self)
        MatchingConfig.__post_init__(self)
        PrunedStartFields.__post_init__(self)
        OnPolicyFields.__post_init__(self)
        if self.layer_map and not self.matches:
            raise ValueError("layer_map: nothing reads it without hidden_coef or attention_coef")
        if self.records not in RECORDS:
            raise ValueError(f"records: must be one of {', '.join(RECORDS)}; was {self.records!r}")


@dataclasses.dataclass(frozen=True)
class DistillConfig(AnsweringConfig):
    """A model that learns to predict as another one does."""

    stage: str = "distill"
    """Always `distill`."""
    init: str = ""
    """Run directory or Hugging Face folder that the student begins from; empty: at random, with
    the teacher's tokenizer."""
    teacher: TeacherFields = TeacherFields()
    distill: DistillFields = DistillFields()
    data: DataConfig = DataConfig()
    sft: ExamplesConfig = ExamplesConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of_conversations and self.data.packing == "concat":
            raise ValueError(
                "data.packing: concat would cut conversations; take best_fit, or none to give each "
                "a row of its own"
            )
        self._check_beginning()
        if self.distill.on_policy_fraction:
            self._check_on_policy()
        elif self.distill.max_prompt != OnPolicyFields.max_prompt:
            raise ValueError("distill.max_prompt: nothing reads it without on_policy_fraction")
        if not self.of_conversations and self.sft != ExamplesConfig():
            raise ValueError(
                "sft: is read of conversations alone; set distill.records=conversations"
            )

    def _check_beginning(self) -> None:
        if self.distill.matches and self.teacher.top_k:
            raise ValueError(
                "teacher.top_k: of what is inside the teacher nothing is kept; leave out either it "
                "or distill.hidden_coef and distill.attention_coef"
            )
        if self.distill.pruned_start and self.init:
            raise ValueError(
                "distill.pruned_start: the student begins from init; leave one of both out"
            )

    def _check_on_policy(self) -> None:
        written = self.distill.on_policy_fraction * self.batch_size
        if round(written) < 1:
            raise ValueError(
                f"distill.on_policy_fraction: of {self.batch_size} sequences that is none; give "
                "more, or a larger batch_size"
            )
        if self.teacher.top_k:
            raise ValueError(
                "teacher.top_k: what the student writes is not known before; leave one of "
                "teacher.top_k and distill.on_policy_fraction out"
            )
        if self.temperature <= 0:
            raise ValueError("temperature: must be positive; what the student writes is drawn")
        for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
            default = getattr(SamplingFields, name)
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}: the student learns on what it would write without it; leave it at "
                    f"{default}"
                )
        if self.sft.train_on_prompt:
            raise ValueError(
                "sft.train_on_prompt: what a student writes begins where an answer does; leave it "
                "out"
            )

    @property
    def of_conversations(self) -> bool:
        """Whether answers are learnt, rather than text."""
        return self.distill.records == "conversations"

    @property
    def trained(self) -> str:
        return beside_the_teacher(super().trained)

    @property
    def kept(self) -> str:
        return beside_the_teacher(super().kept)  # the teacher can be had from its `init` again


def run(config: DistillConfig, workdir: Path | None) -> None:
    """Trains the student on what the teacher predicts, and writes samples and report."""
    directory = work_directory(workdir)
    path = str(tokenizer_path(config.teacher.init))
    if config.init:
        model, path = model_to_continue(config.init, config.model, directory)
        config = dataclasses.replace(config, model=model)
    elif config.distill.pruned_start:
        begun = directory.config_path.exists()
        place = "" if begun else teacher_place(directory, config.teacher)
        config = dataclasses.replace(config, model=model_of_part(config.model, directory, place))
    check = functools.partial(_check, directory)
    train_in(directory, config, TokenizerConfig(path=path), check, _work)


def _check(directory: RunDirectory, config: DistillConfig, tokenizer: TokenizerConfig) -> None:
    """Checks, before anything slow, that the student can learn so of the teacher.

    Raises:
        UserError: it cannot.
    """
    place = teacher_place(directory, config.teacher)
    loaded = load_tokenizer(tokenizer.path)
    student = architecture(config.model, loaded.vocab_size)
    lengths = {"config.data.seq_len": config.data.seq_len}
    if config.distill.on_policy_fraction:
        field = "config.distill.max_prompt and config.max_new_tokens"
        lengths[field] = config.distill.max_prompt + config.max_new_tokens
        check_length(student, lengths[field], field)
    teacher = check_teacher(place, loaded, lengths)
    if config.distill.pruned_start:
        config.distill.taken(teacher, student)
    make = functools.partial(
        init_projections, config.distill.of(student, teacher), student, teacher
    )
    check_writer(config, config.data, loaded, jax.eval_shape(make, jax.random.key(0)))
    if config.of_conversations:
        config.sft.encoder(loaded, config.data.seq_len)


def _work(run: TrainingRun[DistillConfig]) -> dict[str, float]:
    """The run itself; its scores."""
    config = run.config
    kind: DocumentKind = config.sft if config.of_conversations else WholeTexts()
    corpus = run.corpus(config.data, kind)
    model = architecture(config.model, corpus.tokenizer.vocab_size)
    teacher = Teacher(run, config.teacher, corpus.tokenizer)
    live = not config.teacher.top_k
    matching = config.distill.of(model, teacher.model)
    objective = distillation(model, config.distill, teacher.model if live else None, matching)
    beside = (lambda store, rows: rows) if live else _stored(run, model, teacher)
    write_samples = _samples(run, corpus, model)
    evaluation = HeldOut(
        config,
        config.data,
        corpus.eval,
        run.mesh,
        _measure(config, corpus, objective),
        lambda step, params: write_samples(step, student_of(params)),
        beside=beside,
    )
    params = _params(run, model, teacher, matching)
    if config.distill.on_policy_fraction:
        beginnings = beginnings_of(run, corpus, config.distill)
        stream = student_stream(run, beginnings, model)
        run.record(corpus.tokenizer, corpus.fingerprints)
        teacher.record()
        scores = run.learn(stream, model, objective, evaluation, **params)
        return data_scores(corpus) | beginnings.scores | scores if is_main() else {}
    rows = run.rows(config.data, corpus, beside=beside)
    run.begin(corpus, rows)
    teacher.record()
    scores = run.train(rows, model, objective, evaluation, **params)
    return run.data_scores(corpus, rows) | scores if is_main() else {}


def _stored(run: TrainingRun[DistillConfig], model: TransformerConfig, teacher: Teacher) -> Beside:
    """Rows with what the teacher says of them, which it is asked now, or was before."""
    config, stored = run.config, teacher.stored(model, run.config.distill.temperature)
    at_once = config.batch_size // config.micro_batches

    def beside(store: TokenStore, rows: TokenRows) -> TokenRows:
        packing, mask = config.data.packing, config.data.document_mask
        with run.ledger.spending("data"):
            return stored.beside(store, rows, packing, mask, at_once, run.phases)

    return beside


def _params(
    run: TrainingRun[DistillConfig],
    model: TransformerConfig,
    teacher: Teacher,
    matching: Matching,
) -> dict[str, Any]:
    """What `TrainingRun.learn` is told of the parameters: the student's, beside them those of a
    teacher that is asked in each step, and the projections between both."""
    config = run.config
    student = beginning(run, model, teacher, config.distill)
    # What pairs stand beside is in no checkpoint either.
    again = student if config.lora.rank else dict
    if config.teacher.top_k:
        return {"initial_params": student, "base_params": again}
    projections = teacher.projections(model, matching)
    beside = {**teacher.shapes, **jax.eval_shape(projections)}
    return {
        "initial_params": teacher.beside(lambda: {**student(), **projections()}),
        "base_params": teacher.beside(again),
        "param_shapes": {**run.param_shapes(model), **beside},
        "models": {"": model, f"{TEACHER_TREE}/": teacher.model},
    }


def _samples(
    run: TrainingRun[DistillConfig], corpus: Corpus, model: TransformerConfig
) -> WriteSamples:
    """What shows what the student writes."""
    seq_len = run.config.data.seq_len
    if not run.config.of_conversations:
        return text_samples(run, corpus.tokenizer, model, seq_len)
    assert isinstance(corpus.encoder, Examples)
    template = corpus.encoder.template
    # Kept with the run: whoever speaks to the model later does it as it was trained.
    corpus.tokenizer.chat_template = template.source
    return answer_samples(run, corpus, template, model, seq_len, opening)


def _measure(
    config: DistillConfig, corpus: Corpus, objective: Objective
) -> Callable[[Params, Params, Iterable[Batch]], dict[str, float]]:
    """Scores of parameters on what is held out."""
    evaluate = LossEvaluator(objective)

    def measure(params: Params, frozen: Params, batches: Iterable[Batch]) -> dict[str, float]:
        found = {name: mean for name, (mean, _) in evaluate(params, frozen, batches).items()}
        loss = found.pop("loss")
        if config.of_conversations:
            scores = {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}
        else:
            scores = text_scores(loss, corpus.eval)
        names = (
            *("divergence", "agreement", "teacher_loss"),
            *("hidden_error", "attention_divergence"),
        )
        return scores | {f"eval/{name}": found[name] for name in names if name in found}

    return measure
