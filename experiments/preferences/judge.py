"""Samples of a policy and of its reference beside each other, judged by an exact check."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.data.sources import make_source
from jaxllm.inference.chat import Chat
from jaxllm.inference.requests import Completion, Request, Sampling
from jaxllm.inference.scoring import Pair, log_likelihoods
from jaxllm.inference.trained import TrainedModel, load_trained
from jaxllm.rewards.verifiers import ExactMatch
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.tokenizers.chat_template import chat_template


class Judgement(NamedTuple):
    """How a policy does beside its reference."""

    right: float
    """Share of its samples that are right."""
    win_rate: float
    """Mean over prompts of 1 where it alone is right, 0 where the reference alone is, else ½."""
    kl: float
    """KL(π ‖ π_ref) of whole responses, in nats: the mean of log π - log π_ref over π's samples."""
    kl_error: float
    """Its standard error."""


class Judge:
    """Judges policies beside one reference, which answers once."""

    def __init__(self, reference: Path, source: str, count: int = 500) -> None:
        """Samples the reference's answers to the first prompts of `source`, at temperature 1."""
        records = make_source(source, "source", parse_special_tokens=False).records()
        self._records = [record.fields for record in itertools.islice(records, count)]
        self._mesh = make_mesh(MeshConfig())
        with jax.set_mesh(self._mesh):
            self._reference = load_trained(reference, self._mesh)
            requests = _requests(self._reference, self._prompts, seed=0)
            self._right = self._judged(self._reference.complete(requests))

    @property
    def reference_right(self) -> float:
        """Share of the reference's samples that are right."""
        return self._right.mean()

    def __call__(self, policy: Path) -> Judgement:
        """The judgement on the policy of a run."""
        with jax.set_mesh(self._mesh):
            model = load_trained(policy, self._mesh)
            requests = _requests(model, self._prompts, seed=1)
            samples = model.complete(requests)
            ratios = _log_ratios(self._reference, requests, samples)
        right = self._judged(samples)
        wins = (right - self._right + 1) / 2
        error = ratios.std(ddof=1) / len(ratios) ** 0.5
        return Judgement(right.mean(), wins.mean(), ratios.mean(), error)

    @property
    def _prompts(self) -> list[str]:
        return [record["prompt"] for record in self._records]

    def _judged(self, samples: Sequence[Completion]) -> np.ndarray:
        texts = [sample.text for sample in samples]
        return np.array(ExactMatch()(self._prompts, texts, self._records))


def _requests(model: TrainedModel, prompts: Sequence[str], seed: int) -> list[Request]:
    tokenizer = model.loaded.tokenizer
    template = chat_template(tokenizer, "" if tokenizer.chat_template else "bos_separated", "")
    chat = Chat(template, model.loaded.context, Sampling(max_new_tokens=64, temperature=1.0))
    return [
        dataclasses.replace(chat, seed=2 * number + seed)
        .ask([{"role": "user", "content": prompt}])
        .request
        for number, prompt in enumerate(prompts)
    ]


def _log_ratios(
    reference: TrainedModel, requests: Sequence[Request], samples: Sequence[Completion]
) -> np.ndarray:
    """log π - log π_ref of each sample."""
    loaded = reference.loaded
    pairs = [
        Pair(tuple(request.prompt), sample.ids)
        for request, sample in zip(requests, samples, strict=True)
    ]
    found = log_likelihoods(loaded.model, loaded.params, pairs, context=loaded.context)
    return np.array(
        [sum(sample.log_probs) - other.total for sample, other in zip(samples, found, strict=True)]
    )
