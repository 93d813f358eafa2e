"""A trained classifier at work: texts in, their classes or values out."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from jaxllm import config as configuration
from jaxllm.checkpoints.load import LoadedModel, load_model, model_config_of
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.cleaning import Cleaner, CleaningConfig
from jaxllm.data.config import DataConfig
from jaxllm.data.labels import Label, Labels, LabelsConfig, text_tokens
from jaxllm.models.config import TransformerConfig
from jaxllm.objectives.classification import text_outputs
from jaxllm.objectives.objective import Batch, Params
from jaxllm.sharding.mesh import constrain
from jaxllm.tokenizers.tokenizer import Tokenizer

_SHORTEST = 32


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


def outputs_of(
    model: TransformerConfig,
    params: Params,
    rows: Sequence[Sequence[int]],
    context: int,
    batch_size: int,
) -> Iterator[Float32[np.ndarray, " outputs"]]:
    """What the head gives at the last token of each row. The mesh must be set.

    Args:
        model: with a head.
        params: of the model.
        rows: token ids of a text each, `context` at most.
        context: tokens of the longest row.
        batch_size: rows at once.
    """
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        # Few shapes, each compiled once: powers of two up to the context.
        longest = max(_SHORTEST, *map(len, batch))
        length = min(1 << (longest - 1).bit_length(), context)
        tokens = np.zeros((batch_size, length), np.int32)
        lengths = np.ones(batch_size, np.int32)
        for place, row in enumerate(batch):
            tokens[place, : len(row)] = row
            lengths[place] = len(row)
        found = _last_outputs(params, tokens, lengths, model=model)
        yield from np.asarray(found)[: len(batch)]


@partial(jax.jit, static_argnames="model")
def _last_outputs(
    params: Params, tokens: Array, lengths: Array, *, model: TransformerConfig
) -> Float[Array, "batch outputs"]:
    """What the head gives at the last token of each row."""
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    batch: Batch = {
        "tokens": tokens,
        "positions": places,
        "segment_ids": (places < lengths[:, None]).astype(jnp.int32),
    }
    outputs, _ = text_outputs(model, params, batch)
    # Whole in every process, each of which reads it.
    return constrain(jnp.take_along_axis(outputs, lengths[:, None, None] - 1, axis=1)[:, 0])
