"""Samples of a policy and of its reference beside each other, judged by an exact check."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.inference.requests import Completion, Request, Sampling
from jaxllm.inference.scoring import Pair, log_likelihoods
from jaxllm.inference.trained import TrainedModel, load_trained
from jaxllm.rewards.verifiers import ExactMatch
from jaxllm.sharding.mesh import MeshConfig, make_mesh

sys.path.append(str(Path(__file__).parents[1]))
import answers


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
        self._records = answers.first_records(source, count)
        self._mesh = make_mesh(MeshConfig())
        with jax.set_mesh(self._mesh):
            self._reference = load_trained(reference, self._mesh)
            requests = self._asked(self._reference, seed=0)
            self._right = self._judged(self._reference.complete(requests))

    @property
    def reference_right(self) -> float:
        """Share of the reference's samples that are right."""
        return self._right.mean()

    def __call__(self, policy: Path) -> Judgement:
        """The judgement on the policy of a run."""
        with jax.set_mesh(self._mesh):
            model = load_trained(policy, self._mesh)
            requests = self._asked(model, seed=1)
            samples = model.complete(requests)
            ratios = _log_ratios(self._reference, requests, samples)
        right = self._judged(samples)
        wins = (right - self._right + 1) / 2
        error = ratios.std(ddof=1) / len(ratios) ** 0.5
        return Judgement(right.mean(), wins.mean(), ratios.mean(), error)

    @property
    def _prompts(self) -> list[str]:
        return [record["prompt"] for record in self._records]

    def _asked(self, model: TrainedModel, seed: int) -> list[Request]:
        sampling = Sampling(max_new_tokens=64, temperature=1.0)
        return answers.requests_of(model, self._prompts, sampling, seed, stride=2)

    def _judged(self, samples: Sequence[Completion]) -> np.ndarray:
        texts = [sample.text for sample in samples]
        return np.array(ExactMatch()(self._prompts, texts, self._records))


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
