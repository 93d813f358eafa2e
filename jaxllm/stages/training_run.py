"""A training run from an empty directory to its report: what every training stage does alike."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax
from jax.sharding import Mesh

from jaxllm import trees
from jaxllm.checkpoints.base import (
    base_path,
    check_base,
    parameter_checksums,
    record_base,
)
from jaxllm.checkpoints.checkpointer import committed_steps
from jaxllm.checkpoints.load import load_model
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.batches import BatchSource
from jaxllm.data.config import DataConfig
from jaxllm.data.corpus import Corpus, DocumentKind, WholeTexts, prepare_corpus
from jaxllm.data.packing import NO_VALUES, PartValues
from jaxllm.data.store import TokenStore
from jaxllm.data.training_rows import Beside, TrainingRows, training_rows
from jaxllm.errors import UserError
from jaxllm.files import locked
from jaxllm.host_memory import keep_freed_memory_on_cpu
from jaxllm.models.config import HeadConfig, ModelConfig, TransformerConfig, bare
from jaxllm.models.head import init_head
from jaxllm.models.lora import init_pairs
from jaxllm.models.quantised import held, rounded
from jaxllm.models.transformer import SHARDING_RULES, init_params, param_shapes
from jaxllm.objectives.objective import Objective, Params
from jaxllm.planning.flops import model_training_flops_per_token
from jaxllm.planning.parameters import embedding_parameters
from jaxllm.reporting.goodput import Ledger
from jaxllm.reporting.phases import Phases
from jaxllm.reporting.report import write_report
from jaxllm.reporting.tables import print_summary
from jaxllm.sharding.mesh import batch_sharding, make_mesh
from jaxllm.sharding.processes import check_shared, from_main, is_main, main_first
from jaxllm.sharding.rules import shardings
from jaxllm.stages.continued import with_pairs
from jaxllm.stages.data_scores import data_scores, phase_scores, print_mixture, source_scores
from jaxllm.stages.fields import ModelTrainingFields
from jaxllm.stages.fit import check_batch, fit, is_finished
from jaxllm.stages.held_out import HeldOut
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.tokenizer import Tokenizer
from jaxllm.training.loop import Stream
from jaxllm.training.state import TrainState

_PATIENCE_SECONDS = 60.0
"""How long a run waits for another one in its directory, which may just be ending."""

C = TypeVar("C", bound=ModelTrainingFields)


@runtime_checkable
class Evaluation(Protocol):
    """What is measured of a state, now and at the end; `HeldOut` is one."""

    def __call__(self, step: int, state: TrainState, frozen: Params) -> dict[str, float]: ...

    def final_scores(self, state: TrainState, frozen: Params) -> dict[str, float]: ...


@dataclasses.dataclass(frozen=True)
class TrainingRun(Generic[C]):
    """A run that has its directory for itself."""

    config: C
    directory: RunDirectory
    mesh: Mesh
    tokenizer: TokenizerConfig
    begun_with: dict[str, str]
    """Fingerprints of what the run has read before; empty in its first life."""
    ledger: Ledger
    phases: Phases
    keeps_head: bool = False
    """Whether the head of `init`, if it has one, is trained further, rather than a new one."""

    def corpus(self, data: DataConfig, kind: DocumentKind = WholeTexts()) -> Corpus:  # noqa: B008
        """The tokenised documents of the run, made now or before."""
        with self.ledger.spending("data"), main_first():
            return prepare_corpus(
                data, self.tokenizer, self.directory.path, self.phases, self.begun_with, kind
            )

    def rows(
        self,
        data: DataConfig,
        corpus: Corpus,
        part_values: Callable[[TokenStore], Mapping[str, Sequence[PartValues]]] = lambda store: (
            NO_VALUES
        ),
        beside: Beside = lambda store, rows: rows,
    ) -> TrainingRows:
        """The rows that the run will draw; for `part_values` and `beside` see `training_rows`."""
        with self.ledger.spending("data"):
            return training_rows(data, corpus, self.config.seed, self.drawn, part_values, beside)

    def begin(self, corpus: Corpus, rows: TrainingRows) -> None:
        """Records the run, once its data and all that it was given are found good, and keeps its
        tokenizer with it."""
        self.record(corpus.tokenizer, corpus.fingerprints)
        print_mixture(rows, self.drawn)

    def record(self, tokenizer: Tokenizer, fingerprints: dict[str, str]) -> None:
        """As `begin`, of data that is no corpus."""
        if is_main():
            if self.tokenizer.path and not self.begun_with:  # a trained one is there already
                tokenizer.save(self.directory.tokenizer)
            self.directory.begin(dataclasses.asdict(self.config), fingerprints)
            self.ledger.keep(self.directory.goodput)

    def param_shapes(self, model: TransformerConfig) -> dict[str, Any]:
        """The parameters of the model, with the pairs beside them, if there are any.

        Raises:
            UserError: `lora.pattern` matches none.
        """
        return with_pairs(self.config, param_shapes(model))

    def random_params(self, model: TransformerConfig) -> Callable[[], dict[str, Any]]:
        """What makes new parameters of the model."""
        key = jax.random.key(self.config.seed)
        return lambda: self.laid_out(lambda key: init_params(model, key), key)(key)

    def loaded_params(self, model: TransformerConfig) -> dict[str, Any]:
        """The parameters of `init`, with new pairs beside them, if there are to be any.

        Raises:
            UserError: they are not those that the run began with.
        """
        config = self.config
        if not config.lora.rank:
            wanted = config.model if self.keeps_head else _without_head(config.model)
            return self._with_head(load_model(config.init, self.mesh, wanted).params, model)
        params = self._with_head(self._base_params(), model)
        how, key = config.lora.base, jax.random.key(config.seed)
        make = self.laid_out(
            lambda params, key: init_pairs(rounded(params, how), config.lora, key), params, key
        )
        pairs = make(params, key)
        if how:  # donated: the base is not to be there twice
            params = self.laid_out(lambda params: held(params, how), params, donate=True)(params)
        return trees.merge(params, pairs)

    def laid_out(self, make: Callable[..., Any], *arguments: Any, donate: bool = False) -> Any:
        """A jitted function whose result, parameters, lies on the mesh as they do."""
        layout = shardings(jax.eval_shape(make, *arguments), SHARDING_RULES, self.mesh)
        return jax.jit(make, out_shardings=layout, donate_argnums=(0,) if donate else ())

    def _with_head(self, params: dict[str, Any], model: TransformerConfig) -> dict[str, Any]:
        """The parameters with a head, if there is to be one and `init` has none for the same."""
        if not model.head.outputs or "head" in params:
            return params
        key = jax.random.key(self.config.seed) if self.config.random_head else None
        return params | self.laid_out(lambda: init_head(model, key))()

    def _base_params(self) -> dict[str, Any]:
        """The parameters that pairs are trained beside; which they are is recorded, and checked in
        later lives, in which the base may have been moved together with the run."""
        directory = self.directory
        known = from_main(directory.base.exists)
        if not known and from_main(lambda: committed_steps(directory.checkpoints)):
            raise UserError(
                f"{directory.base}: is gone, and with it which base the pairs of the checkpoints "
                "were trained beside; put it back, or begin in another --workdir."
            )
        init = str(base_path(directory)) if known else self.config.init
        wanted = bare(self.config.model)
        if self.keeps_head:
            wanted = dataclasses.replace(wanted, head=self.config.model.head)
        params = load_model(init, self.mesh, wanted).params
        checksums = parameter_checksums(trees.divide(params, "head/.*")[1])  # which is trained
        if known:
            check_base(directory, init, checksums)
        elif is_main():
            record_base(directory, init, checksums)
        return params

    def train(
        self,
        rows: TrainingRows,
        model: TransformerConfig,
        objective: Objective,
        evaluation: HeldOut,
        *,
        initial_params: Callable[[], dict[str, Any]] | None = None,
        predicted: float = 1.0,
        param_shapes: Mapping[str, Any] | None = None,
        base_params: Callable[[], dict[str, Any]] | None = None,
        models: Mapping[str, TransformerConfig] = MappingProxyType({}),
    ) -> dict[str, float]:
        """Trains to the end over the run's mesh, and evaluates.

        Args:
            rows: what is drawn.
            model: what is trained.
            objective: what is minimised.
            evaluation: what is measured and shown now and then.
            initial_params: makes the parameters that training begins from; None: those of `init`.
            predicted: share of places whose token is predicted, for MFU.
            param_shapes: of those parameters, where they are more than the model's.
            base_params: makes those parameters that are not in checkpoints, and perhaps others,
                where a run goes on; None: `initial_params` does.
            models: what is computed, by where its parameters stand, if not `model` alone.

        Returns:
            The final scores, and what was measured on the way.
        """
        batch_size = self.config.batch_size
        source = BatchSource(rows.mixture, batch_size, batch_sharding(self.mesh))
        with contextlib.closing(source):
            scores = self.learn(
                Stream(
                    source, rows.sources[0].seq_len, lambda step: rows.scalars(step * batch_size)
                ),
                model,
                objective,
                evaluation,
                initial_params=initial_params,
                predicted=predicted,
                param_shapes=param_shapes,
                base_params=base_params,
                models=models,
            )
        return scores | {"train/tokens": float(self.drawn * rows.sources[0].seq_len)}

    def learn(
        self,
        stream: Stream,
        model: TransformerConfig,
        objective: Objective,
        evaluation: Evaluation,
        *,
        initial_params: Callable[[], dict[str, Any]] | None = None,
        predicted: float = 1.0,
        param_shapes: Mapping[str, Any] | None = None,
        base_params: Callable[[], dict[str, Any]] | None = None,
        models: Mapping[str, TransformerConfig] = MappingProxyType({}),
    ) -> dict[str, float]:
        """As `train`, from any source of batches.

        Args:
            stream: the batches.
            model, objective, evaluation, initial_params, predicted: see `train`.
            param_shapes, base_params, models: see there.
        """
        config, shapes = self.config, param_shapes or self.param_shapes(model)
        trained, _ = trees.split(shapes, config.trained)
        paths = {path for path, _ in trees.leaves_with_paths(trained)}
        with jax.set_mesh(self.mesh):
            state, frozen, measured = fit(
                config,
                self.directory,
                self.mesh,
                objective=objective,
                initial_params=initial_params or (lambda: self.loaded_params(model)),
                param_shapes=shapes,
                rules=SHARDING_RULES,
                stream=stream,
                evaluate=evaluation,
                ledger=self.ledger,
                flops_per_token=sum(
                    model_training_flops_per_token(
                        each,
                        stream.seq_len,
                        predicted,
                        {path.removeprefix(begin) for path in paths if path.startswith(begin)},
                    )
                    for begin, each in (models or {"": model}).items()
                ),
                base_params=base_params,
            )
            final = evaluation.final_scores(state, frozen)
        whole = self.param_shapes(model)
        counted = {
            "model/parameters": float(trees.size(whole)),
            "model/embedding_parameters": float(embedding_parameters(whole)),
            "train/skipped": float(state.skipped),
        }
        return final | measured | counted

    def data_scores(self, corpus: Corpus, rows: TrainingRows) -> dict[str, float]:
        """What the summary tells of the data."""
        return data_scores(corpus) | source_scores(rows) | rows.scalars(self.drawn)

    @property
    def drawn(self) -> int:
        """Rows of all steps."""
        return self.config.steps * self.config.batch_size


def _without_head(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, head=HeadConfig())


def work_directory(workdir: Path | None) -> RunDirectory:
    """The directory of a training run.

    Raises:
        UserError: none is given.
    """
    if workdir is None:
        raise UserError("--workdir is missing: give the directory that the run is to be kept in.")
    return RunDirectory(workdir)


def train_in(
    directory: RunDirectory,
    config: C,
    tokenizer: TokenizerConfig,
    check: Callable[[C, TokenizerConfig], None],
    work: Callable[[TrainingRun[C]], dict[str, float]],
) -> None:
    """Opens the directory for a run, has the work done there, and writes summary and report.

    A run that is finished is left as it is, and said to be.

    Args:
        directory: of the run.
        config: of the stage, with the model that it trains.
        tokenizer: what to train, or where one is; a run that has begun has its own copy.
        check: raises a UserError for what is wrong before anything slow is done.
        work: prepares, trains and evaluates; gives the final scores.
    """
    ledger = Ledger(time.monotonic())
    keep_freed_memory_on_cpu()
    if top := config.train.last_layers:
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, top_layers=top)
        )
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    begun_with = from_main(directory.data)
    if begun_with and tokenizer.path:
        tokenizer = dataclasses.replace(tokenizer, path=str(directory.tokenizer))
    finished = from_main(lambda: is_finished(config, directory))
    if not finished:
        check(config, tokenizer)
    with main_first():
        directory.open(dataclasses.asdict(config), dataclasses.asdict(type(config)()))
    check_shared(directory.path, "--workdir")
    with locked(directory.path, _PATIENCE_SECONDS) if is_main() else contextlib.nullcontext():
        # It may have been finished while this one waited.
        if finished or from_main(lambda: is_finished(config, directory)):
            print(f"{directory.path}: the run is finished; raise config.steps to train on.")
            return
        begin, phases = time.monotonic(), Phases()
        run = TrainingRun(config, directory, mesh, tokenizer, begun_with, ledger, phases)
        scores = work(run)
        if not is_main():
            return
        scores = scores | phase_scores(phases) | ledger.finish()
        scores["time/total"] = time.monotonic() - begin
        directory.write_summary(scores)
        report = write_report(directory.path)
        print_summary(scores)
        print(f"report: {report}")
