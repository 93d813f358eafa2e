"""A trained classifier at work: texts in, their classes or values out."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from jaxllm import config as configuration
from jaxllm.checkpoints.load import LoadedModel, load_model, model_config_of
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.cleaning import Cleaner, CleaningConfig
from jaxllm.data.config import DataConfig
from jaxllm.data.labels import Label, Labels, LabelsConfig, text_tokens
from jaxllm.inference.heads import outputs_of
from jaxllm.models.config import TransformerConfig
from jaxllm.objectives.objective import Params
from jaxllm.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a text was taken to be."""

    label: Label
    """The likeliest class; the classes that are likelier than not; or the value."""
    probabilities: Mapping[str, float]
    """Of each class; empty of a value."""


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Classifies texts, several at once. The mesh must be set."""

    model: TransformerConfig
    params: Params
    tokenizer: Tokenizer
    labels: Labels
    context: int
    """Tokens of a text that are read at most."""
    batch_size: int = 32
    cleaning: CleaningConfig | None = None
    """What is done to each text first; None: nothing."""

    def __call__(self, texts: Sequence[str]) -> list[Prediction]:
        """What each text is taken to be; of one that is too long, its beginning."""
        if self.cleaning is not None:
            clean = Cleaner(self.cleaning)
            texts = [clean(text) or "" for text in texts]
        return [self._prediction(outputs) for outputs in self._outputs(texts)]

    def _outputs(self, texts: Sequence[str]) -> Iterator[Float32[np.ndarray, " outputs"]]:
        encoded = self.tokenizer.encode_batch(list(texts))
        rows = [text_tokens(self.tokenizer, ids, self.context) for ids in encoded]
        return outputs_of(self.model, self.params, rows, self.context, self.batch_size)

    def _prediction(self, outputs: Float32[np.ndarray, " outputs"]) -> Prediction:
        labels = self.labels
        if labels.kind == "regression":
            return Prediction(float(outputs[0]) * labels.deviation + labels.mean, {})
        wide = outputs.astype(np.float64)
        if labels.kind == "single_label":
            likelihoods = np.exp(wide - wide.max())
            shares = likelihoods / likelihoods.sum()
            label: Label = labels.names[int(np.argmax(wide))]
        else:
            shares = 1 / (1 + np.exp(-wide))
            label = tuple(name for name, x in zip(labels.names, wide, strict=True) if x > 0)
        named = zip(map(str, labels.names), shares.tolist(), strict=True)
        return Prediction(label, dict(named))


def load_classifier(path: str | Path, mesh: Mesh, batch_size: int = 32) -> Classifier:
    """The classifier that the run of `classify` at `path` has trained.

    Raises:
        UserError: there is no such run, it is of another stage, or it has no checkpoint yet.
    """
    model_config_of(path)  # a wrong path is told as such
    Labels.load(RunDirectory(path).labels)
    return classifier_of(RunDirectory(path), load_model(path, mesh), batch_size)


def classifier_of(run: RunDirectory, loaded: LoadedModel, batch_size: int = 32) -> Classifier:
    """The classifier of a run whose model is loaded; it reads texts as the run did.

    Raises:
        UserError: the run is of another stage.
    """
    labels = Labels.load(run.labels)
    data = configuration.from_dict(DataConfig, run.group("data"), "data")
    return Classifier(
        loaded.model,
        loaded.params,
        loaded.tokenizer,
        labels,
        data.seq_len,
        batch_size,
        data.cleaning,
    )


def labels_config_of(run: RunDirectory) -> LabelsConfig:
    """Which fields a run of `classify` has read, and as what.

    Raises:
        UserError: the run is of another stage.
    """
    recorded = run.group("classify")
    names = {field.name for field in dataclasses.fields(LabelsConfig)}
    own = {name: value for name, value in recorded.items() if name in names}
    return configuration.from_dict(LabelsConfig, own, "classify")
