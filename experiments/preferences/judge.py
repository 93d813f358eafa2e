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
    """Share of its samples that are right,"""
    reference_right: float
    """and of the reference's."""
    win_rate: float
    """Mean over prompts of 1 where it alone is right, 0 where the reference alone is, else ½."""
    kl: float
    """KL(π ‖ π_ref) of whole responses, in nats: the mean of log π - log π_ref over π's samples."""
    kl_error: float
    """Its standard error."""


def judge(policy: Path, reference: Path, source: str, count: int = 500) -> Judgement:
    """Samples an answer of both to each of the first prompts of `source`, at temperature 1."""
    records = [
        record.fields
        for record in itertools.islice(
            make_source(source, "source", parse_special_tokens=False).records(), count
        )
    ]
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        models = [load_trained(path, mesh) for path in (policy, reference)]
        requests = [
            _requests(models[0], [record["prompt"] for record in records], seed) for seed in (0, 1)
        ]
        samples = [model.complete(asked) for model, asked in zip(models, requests, strict=True)]
        kls = _log_ratios(models[1], requests[0], samples[0])
    prompts = [record["prompt"] for record in records]
    right, reference_right = (
        np.array(ExactMatch()(prompts, [sample.text.strip() for sample in each], records))
        for each in samples
    )
    return Judgement(
        right.mean(),
        reference_right.mean(),
        ((right - reference_right + 1) / 2).mean(),
        kls.mean(),
        kls.std(ddof=1) / len(kls) ** 0.5,
    )


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
