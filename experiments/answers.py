"""What the model of a run answers to prompts, asked as it was tuned."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.data.sources import make_source
from jaxllm.inference.chat import Chat
from jaxllm.inference.requests import Request, Sampling
from jaxllm.inference.trained import TrainedModel, load_trained
from jaxllm.rewards.specification import parse_rewards
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.tokenizers.chat_template import chat_template


def first_records(source: str, count: int) -> list[Mapping[str, Any]]:
    """The fields of the first records of a source."""
    records = make_source(source, "source", parse_special_tokens=False).records()
    return [record.fields for record in itertools.islice(records, count)]


def requests_of(
    model: TrainedModel, prompts: Sequence[str], sampling: Sampling, seed: int = 0, stride: int = 1
) -> list[Request]:
    """A request for each prompt; that of number n is drawn by `stride` * n + `seed`."""
    tokenizer = model.loaded.tokenizer
    template = chat_template(tokenizer, "" if tokenizer.chat_template else "bos_separated", "")
    chat = Chat(template, model.loaded.context, sampling)
    return [
        dataclasses.replace(chat, seed=stride * number + seed)
        .ask([{"role": "user", "content": prompt}])
        .request
        for number, prompt in enumerate(prompts)
    ]


def mean_reward(run: Path, source: str, rewards: str, count: int, max_new_tokens: int) -> float:
    """What the likeliest answers to the first prompts of a source are worth in the mean."""
    records, mesh = first_records(source, count), make_mesh(MeshConfig())
    prompts = [record["prompt"] for record in records]
    with jax.set_mesh(mesh):
        model = load_trained(run, mesh)
        asked = requests_of(model, prompts, Sampling(max_new_tokens, temperature=0.0))
        texts = [done.text for done in model.complete(asked)]
    numbered = [f"prompt {number}" for number in range(count)]
    judged = parse_rewards(rewards, "rewards", {})(prompts, texts, records, numbered)
    return float(np.mean(judged.total))
