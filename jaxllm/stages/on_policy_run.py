"""A run in which a policy learns from its own responses: its prompts, what judges the responses,
the reference, and the loop."""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax

from jaxllm.checkpoints.base import JUDGE, check_base, parameter_checksums, record_base
from jaxllm.data.corpus import check_expected, stores_folder
from jaxllm.data.prompts import DrawnPrompts, Prompt, PromptReader, Prompts, read_prompts
from jaxllm.data.rankings import joint_of, layout_of
from jaxllm.data.selection import split_documents
from jaxllm.errors import UserError
from jaxllm.files import locked
from jaxllm.inference.engine import Engine
from jaxllm.inference.requests import Sampling
from jaxllm.inference.reward_model import RewardModel, load_reward_model
from jaxllm.models.config import TransformerConfig
from jaxllm.models.transformer import param_shapes
from jaxllm.objectives.objective import Objective, Params
from jaxllm.rollouts.judging import Judge
from jaxllm.rollouts.learner import Learner
from jaxllm.rollouts.source import Estimator, Rollouts
from jaxllm.rollouts.writer import Writer
from jaxllm.sharding.processes import from_main, is_main, main_first
from jaxllm.stages.data_scores import reading_scores
from jaxllm.stages.frozen_model import FrozenModel
from jaxllm.stages.held_out_prompts import HeldOutPrompts
from jaxllm.stages.on_policy import OnPolicyConfig, parsed_rewards
from jaxllm.stages.reference import (
    REFERENCE_TREE,
    beside,
    origin_of,
    policy_of,
    without_pairs,
)
from jaxllm.stages.training_run import TrainingRun
from jaxllm.tokenizers.chat_template import ChatTemplate
from jaxllm.tokenizers.tokenizer import load_tokenizer
from jaxllm.training.loop import Stream

C = TypeVar("C", bound=OnPolicyConfig)


class Asked(NamedTuple):
    """What a run asks its policy."""

    template: ChatTemplate
    prompts: Prompts
    drawn: Callable[[int], Prompt]
    """The training prompts by number, in the order in which they are asked."""
    fingerprints: dict[str, str]
    scores: dict[str, float]
    """What the summary tells of them."""


def read_asked(run: TrainingRun[C]) -> Asked:
    """The prompts of a run.

    Raises:
        UserError: a source is wrong, or has no prompt, or too few.
    """
    config, data = run.config, run.config.data
    tokenizer = load_tokenizer(run.tokenizer.path)
    template = layout_of(tokenizer, config.rl.template, "config.rl.template")
    stores = stores_folder(data, run.directory.path)
    with run.ledger.spending("data"):
        with main_first(), locked(stores):
            reader = PromptReader(joint_of(template))
            split = split_documents(data, stores, run.directory.path, run.phases, reader)
        check_expected(run.begun_with, "text", split.fingerprint)
        check_expected(run.begun_with, "tokenizer", tokenizer.fingerprint)
        prompts = read_prompts(split, template, config.rl.max_prompt)
    if prompts.dropped and is_main():
        print(
            f"{prompts.dropped:,} prompts of more than config.rl.max_prompt="
            f"{config.rl.max_prompt} tokens are left out",
            file=sys.stderr,
        )
    drawn = DrawnPrompts(prompts, data, config.seed)
    rollouts = -(-config.steps // config.rl.updates)
    wanted = rollouts * config.batch_size * config.rl.minibatches // config.rl.group_size
    if len(drawn) < wanted:
        raise UserError(
            f"config.data: the limits of epochs allow {len(drawn):,} prompts, and "
            f"{config.steps:,} steps ask {wanted:,}; give more prompts, raise the limits, or make "
            "fewer steps."
        )
    tokenizer.chat_template = template.source  # kept with the run
    scores = reading_scores(split) | {
        "data/train_prompts": float(sum(map(len, prompts.train))),
        "data/eval_prompts": float(len(prompts.held_out)),
        "data/dropped_prompts": float(prompts.dropped),
    }
    fingerprints = {"text": split.fingerprint, "tokenizer": tokenizer.fingerprint}
    return Asked(template, prompts, drawn.__getitem__, fingerprints, scores)


def judge_of(run: TrainingRun[C], template: ChatTemplate) -> Judge:
    """What judges responses, with the reward model, if there is one.

    Raises:
        UserError: `rewards` is wrong, or the reward model is none or has another tokenizer.
    """
    config = run.config
    if not config.reward.init:
        return parsed_rewards(config, None)
    with jax.set_mesh(run.mesh):
        model = load_reward_model(
            config.reward.init, run.mesh, config.micro_batch_size or config.batch_size
        )
        if config.reward.dtype != "float32":
            model = dataclasses.replace(model, params=_cast(model.params, config.reward.dtype))
    if model.context < config.places and is_main():
        print(
            f"the reward model reads {model.context} tokens, its data.seq_len, and prompts and "
            f"responses have up to {config.places}: of longer ones it misses the beginning",
            file=sys.stderr,
        )
    ours, theirs = template.tokenizer.fingerprint, model.template.tokenizer.fingerprint
    if ours != theirs and not config.reward.retokenise:
        raise UserError(
            f"config.reward.init: {config.reward.init} has another tokenizer than the policy; "
            "config.reward.retokenise=True shows it the text of responses instead of their tokens."
        )
    same = ours == theirs and template.source == model.template.source
    return parsed_rewards(config, model, reads_ids=same)


def _cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda x: x.astype(dtype), params)


class PolicyModels(NamedTuple):
    """What an algorithm makes of its configuration."""

    learner: Learner
    estimator: Estimator
    objective: Objective
    initial_params: Callable[[], dict[str, Any]] | None
    """As of `TrainingRun.train`, without the reference."""
    shapes: dict[str, Any]
    """Of these."""
    writer_of: Callable[[Params], Params]
    """The parameters of the policy alone, of all."""
    models: Mapping[str, TransformerConfig] = MappingProxyType({})
    """As of `TrainingRun.learn`."""
    base_params: Callable[[], dict[str, Any]] | None = None
    """As of `TrainingRun.learn`, without the reference."""


def reference_of(
    config: OnPolicyConfig, writer_of: Callable[[Params], Params]
) -> Callable[[Params], Params] | None:
    """The parameters of the reference, of all; `writer_of` as of `PolicyModels`."""
    if not config.needs_reference:
        return None
    if config.reference_is_base:
        return lambda params: without_pairs(writer_of(params))
    return beside


def learn(
    run: TrainingRun[C],
    asked: Asked,
    judge: Judge,
    model: TransformerConfig,
    models: PolicyModels,
) -> dict[str, float]:
    """The run itself; its scores."""
    config, template = run.config, asked.template
    with run.ledger.spending("data"):
        judge.check(itertools.chain(*asked.prompts.train, asked.prompts.held_out))
    origin = origin_of(run, config.reference.init or config.init)
    engine = functools.partial(_engine, run, template, model, models.writer_of)
    sampling = Sampling(config.max_new_tokens, config.temperature, stop=config.sampling().stop)
    writer = Writer(
        asked.drawn,
        engine,
        template.tokenizer,
        sampling,
        template.stop_ids,
        config.rl.group_size,
        config.rl.calculator,
    )
    rollouts = Rollouts(
        config.rl,
        writer,
        judge,
        models.learner,
        models.estimator,
        mesh=run.mesh,
        batch_size=config.batch_size,
        parts=config.micro_batches,
        places=config.places,
        seed=config.seed,
        writing=functools.partial(run.ledger.spending, "rollout"),
    )
    evaluation = HeldOutPrompts(run, asked.prompts.held_out, judge, writer)
    run.record(template.tokenizer, asked.fingerprints)
    if judge.model:
        _same_judge(run, judge.model)
    held = config.needs_reference and not config.reference_is_base
    if held:
        origin.record()
    shapes = models.shapes
    initial = models.initial_params or (lambda: run.loaded_params(model))
    base = (models.base_params or initial) if config.lora.rank else dict
    if held:
        dtype = config.reference.dtype
        shapes = {**shapes, REFERENCE_TREE: _shapes(param_shapes(model), dtype)}
        initial, base = (
            functools.partial(_with_reference, make, origin, dtype) for make in (initial, base)
        )
    scores = run.learn(
        Stream(rollouts, config.places, rollouts.scalars, rollouts.prepare, rollouts.memory),
        model,
        models.objective,
        evaluation,
        initial_params=initial,
        param_shapes=shapes,
        base_params=base,
        models=models.models,
    )
    return asked.scores | scores if is_main() else {}


def _same_judge(run: TrainingRun[C], model: RewardModel) -> None:
    """Writes which reward model judges a run, in its first life, and checks later that it still
    does.

    Raises:
        UserError: it is another one.
    """
    directory, init = run.directory, run.config.reward.init
    known = from_main((directory.path / JUDGE.file).exists)
    checksums = parameter_checksums(model.params)
    if known:
        check_base(directory, init, checksums, JUDGE)
    elif is_main():
        record_base(directory, init, checksums, JUDGE)


def _with_reference(
    make: Callable[[], dict[str, Any]], origin: FrozenModel, dtype: str
) -> dict[str, Any]:
    """Parameters with those of the reference beside them."""
    return {**make(), REFERENCE_TREE: _cast(origin.given_up(), dtype)}


def _shapes(shapes: Params, dtype: str) -> Params:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)


def _engine(
    run: TrainingRun[C],
    template: ChatTemplate,
    model: TransformerConfig,
    writer_of: Callable[[Params], Params],
    params: Params,
) -> Engine:
    """What writes with the policy among `params`."""
    return Engine(
        model,
        writer_of(policy_of(params)),
        template.tokenizer,
        context=run.config.places,
        slots=run.config.rl.slots,
        tempered=True,
    )
