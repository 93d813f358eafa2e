"""Seconds of an iteration of GRPO and PPO on CPU, beside TRL and Tunix; and of generation alone.

    python benchmarks/rollouts.py [--turns=3] [--task=grpo|ppo|generation] [--only=jaxllm,tunix]

Needs `pip install -e .[peers]`, `pip install trl` and `pip install google-tunix`. TRL has no
PPOTrainer after 1.12; for `--task=ppo` the environment has to name, as TRL_PPO, a folder made by
`pip install --no-deps --target=FOLDER trl==1.12.0`.

All have the Llama of benchmarks/llama.py (8.5 M parameters, float32, AdamW, gradients clipped),
random weights, and prompts of 32 tokens, which they continue by 64: what ends a text stands behind
the model's vocabulary. Processes of their own work in turn, as in benchmarks/train.py.

`grpo`: 4 prompts are answered 8 times each, and learnt from in one update, whose loss holds the
policy to a reference (k3). `ppo`: 32 prompts are answered, and learnt from in 4 updates of all 32,
by a policy and by a value function that is a model as large; there is a reference too. Rewards are
the length of a text. TRL's PPO wants a model instead, and gets a module without parameters, which
gives the id of the last token; it makes no texts, and does not clip. `generation`: the 32 prompts
of PPO, by our engine, by `generate` of Transformers and by Tunix's sampler, with texts.

At the end each process tells where its median iteration's time went, and the most memory it has
held. Generation ends with the texts; scoring with what updates need beside them: rewards,
log-probabilities of reference and policy, values, advantages.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

from in_turn import Step, held, measure, print_medians, work
from llama import jaxllm_training
from rollout_peers import (
    transformers_generation,
    trl_grpo,
    trl_ppo,
    tunix_generation,
    tunix_grpo,
    tunix_ppo,
)
from rollout_work import (
    END,
    EPOCHS,
    GROUP,
    GRPO_TEMPERATURE,
    KL_LOSS,
    KL_REWARD,
    NEW,
    PADDING,
    PPO_TEMPERATURE,
    PROMPT,
    ROWS,
    Laps,
    prompts,
    rewards,
    texts,
    words,
)


def jaxllm_words() -> Any:
    """`words` for us."""
    from jaxllm.tokenizers.hugging_face import HuggingFaceTokenizer

    marks = {"bos_token": END, "eos_token": END, "pad_token": PADDING}
    return HuggingFaceTokenizer(words().to_str(), marks)


def jaxllm_grpo(laps: Laps) -> Step:
    """Ours, put together as in `stages/grpo.py`."""
    from jaxllm.models.transformer import init_params
    from jaxllm.objectives.grpo import grpo
    from jaxllm.objectives.policy_gradient import PolicyLossConfig
    from jaxllm.rollouts.config import RolloutConfig
    from jaxllm.rollouts.estimators import GroupConfig, GroupEstimator
    from jaxllm.rollouts.learner import Learner
    from jaxllm.stages.reference import beside

    loss = PolicyLossConfig(kl_loss=KL_LOSS)
    training = jaxllm_training(lambda model: grpo(model, loss, GRPO_TEMPERATURE, NEW))
    model = training.model
    learner = Learner(model, None, False, beside, needs_old=False, temperature=GRPO_TEMPERATURE)
    estimator = GroupEstimator(GroupConfig(), GROUP, True, ("reference_log_probs",))
    config = RolloutConfig(group_size=GROUP)
    init = functools.partial(init_params, model)
    return jaxllm_iteration(laps, training, config, learner, estimator, init, lambda params: params)


def jaxllm_ppo(laps: Laps) -> Step:
    """Ours, put together as in `stages/ppo.py`."""
    from jaxllm.models.config import HeadConfig
    from jaxllm.models.transformer import init_params
    from jaxllm.objectives.ppo import POLICY_TREE, VALUE_TREE, PpoLossConfig, ppo
    from jaxllm.rollouts.config import RolloutConfig
    from jaxllm.rollouts.estimators import GaeConfig, GaeEstimator
    from jaxllm.rollouts.learner import Learner
    from jaxllm.stages.reference import beside

    def value_of(model: Any) -> Any:
        return dataclasses.replace(model, head=HeadConfig(1))

    training = jaxllm_training(
        lambda model: ppo(model, value_of(model), PpoLossConfig(), PPO_TEMPERATURE, NEW)
    )
    model, value = training.model, value_of(training.model)
    learner = Learner(model, value, True, beside, needs_old=True, temperature=PPO_TEMPERATURE)
    estimator = GaeEstimator(GaeConfig(), True, ("old_log_probs",))
    config = RolloutConfig(epochs=EPOCHS, kl_coef=KL_REWARD)

    def init(key: Any) -> dict[str, Any]:
        return {POLICY_TREE: init_params(model, key), VALUE_TREE: init_params(value, key)}

    return jaxllm_iteration(
        laps, training, config, learner, estimator, init, lambda params: params[POLICY_TREE]
    )


def jaxllm_iteration(
    laps: Laps,
    training: Any,
    config: Any,
    learner: Any,
    estimator: Any,
    init: Callable[[Any], dict[str, Any]],
    policy: Callable[[Any], Any],
) -> Step:
    """A rollout and its updates, as `stages/on_policy_run.py` and `training/loop.py` make them.

    Args:
        laps: told of the parts.
        training: of `jaxllm_training`.
        config: of rollouts.
        learner, estimator: of the algorithm.
        init: makes the parameters that are trained.
        policy: those of the policy among them.
    """
    import jax
    import jax.numpy as jnp

    from jaxllm import trees
    from jaxllm.data.prompts import Prompt
    from jaxllm.inference.engine import Engine
    from jaxllm.inference.requests import Sampling
    from jaxllm.models.transformer import SHARDING_RULES
    from jaxllm.rewards.weighted import Rewards, WeightedReward
    from jaxllm.rollouts.judging import Judge
    from jaxllm.rollouts.source import Rollouts
    from jaxllm.rollouts.writer import Writer
    from jaxllm.stages.on_policy import RlFields
    from jaxllm.stages.reference import REFERENCE_TREE, policy_of
    from jaxllm.training.step import init_state, jit_step, sparing_step, state_shapes

    mesh, optimizer, tokenizer = training.mesh, training.optimizer, jaxllm_words()
    places, slots = PROMPT + NEW, RlFields().slots
    jax.set_mesh(mesh)
    count = ROWS // config.group_size
    asked = [
        Prompt(tuple(row), [{"role": "user", "content": text}], {})
        for row, text in zip(prompts(count).tolist(), texts(count), strict=True)
    ]

    def engine(params: Any) -> Engine:
        written_by = policy(policy_of(params))
        return Engine(
            training.model, written_by, tokenizer, context=places, slots=slots, tempered=True
        )

    sampling = Sampling(NEW, learner.temperature)
    writer = Writer(lambda n: asked[n % count], engine, tokenizer, sampling, (), config.group_size)
    length = WeightedReward("length", lambda prompts, responses, records: rewards(responses))
    judge = Judge(config, Rewards((length,)), NEW)
    sizes = {"batch_size": ROWS, "parts": 1, "places": places, "seed": 0}
    rollouts = Rollouts(config, writer, judge, learner, estimator, mesh=mesh, **sizes)
    Writer.rollout = laps.ending("generation", Writer.rollout)

    params = jax.jit(init)(jax.random.key(0))
    frozen = {REFERENCE_TREE: jax.tree.map(jnp.copy, policy(params))}
    param_shapes = jax.eval_shape(lambda: params)
    shapes = state_shapes(param_shapes, optimizer, SHARDING_RULES, mesh, extra=rollouts.memory)
    state = init_state(params, optimizer, shapes)
    train_step = sparing_step(jit_step(training.step, shapes, mesh))
    del params
    step = 0

    def run() -> None:
        nonlocal state, step
        for update in range(config.updates):
            extra = rollouts.prepare(step, trees.merge(state.params, frozen), state.extra)
            if not update:
                laps.end("scoring")
            state = dataclasses.replace(state, extra=extra)
            state, metrics = train_step(state, frozen, rollouts(step, state))
            step += 1
        jax.block_until_ready((state, metrics))

    return laps.of(run, "updates")


def jaxllm_generation(laps: Laps) -> Step:
    """Our engine."""
    import jax

    from jaxllm.inference.engine import Engine
    from jaxllm.inference.requests import Request, Sampling
    from jaxllm.models.transformer import init_params

    model, _, mesh, _ = jaxllm_training()
    jax.set_mesh(mesh)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    engine = Engine(model, params, jaxllm_words(), context=PROMPT + NEW)
    rows = prompts(ROWS).tolist()
    requests = [Request(tuple(row), Sampling(NEW), seed) for seed, row in enumerate(rows)]
    return laps.of(lambda: rewards([one.text for one in engine.complete(requests)]), "generation")


STEPS: dict[str, dict[str, Callable[[Laps], Step]]] = {
    "grpo": {"jaxllm": jaxllm_grpo, "trl": trl_grpo, "tunix": tunix_grpo},
    "ppo": {"jaxllm": jaxllm_ppo, "trl": trl_ppo, "tunix": tunix_ppo},
    "generation": {
        "jaxllm": jaxllm_generation,
        "transformers": transformers_generation,
        "tunix": tunix_generation,
    },
}


def main() -> None:
    """Prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--task", choices=STEPS, default="grpo")
    parser.add_argument("--only", default="")
    parser.add_argument("--worker")
    options = parser.parse_args()
    if options.worker:
        task, name = options.worker.split(":")
        laps = Laps()
        work(STEPS[task][name](laps))
        print(f"{name}: {laps}; it {held()}", file=sys.stderr)
        return

    names = options.only.split(",") if options.only else list(STEPS[options.task])
    measured = measure(__file__, [f"{options.task}:{name}" for name in names], options.turns)
    seconds = dict(zip(names, measured.values(), strict=True))
    title = f"{options.task}: {ROWS} x {NEW} new tokens, {2 * options.turns} iterations of each"
    print_medians(seconds, title)


if __name__ == "__main__":
    sys.exit(main())
