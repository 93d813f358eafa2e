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
import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from in_turn import Step, measure, work
from llama import HEADS, LAYERS, MLP, VOCAB, WIDTH, jaxllm_training, transformers_llama

ROWS, GROUP, PROMPT, NEW = 32, 8, 32, 64
EPOCHS, KL_LOSS, KL_REWARD = 4, 0.04, 0.05
GRPO_TEMPERATURE, PPO_TEMPERATURE = 1.0, 0.7
END, PADDING = "</s>", "<pad>"
WARM_UP = 3
"""Iterations that `work` makes before any is counted."""


class Laps:
    """Where the time of iterations goes."""

    def __init__(self) -> None:
        self._last = 0.0
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def end(self, part: str) -> None:
        """What has been done since the last part ended was this one."""
        now = time.perf_counter()
        self._seconds[part].append(now - self._last)
        self._last = now

    def ending(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose return ends a part."""

        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            self.end(part)
            return result

        return timed

    def of(self, run: Callable[[], None], last: str) -> Step:
        """The iteration, whose return ends the last part."""
        timed = self.ending(last, run)

        def step() -> None:
            self._last = time.perf_counter()
            timed()

        return step

    def __str__(self) -> str:
        medians = {
            part: statistics.median(seconds[WARM_UP:]) for part, seconds in self._seconds.items()
        }
        return ", ".join(f"{part} {median:.2f} s" for part, median in medians.items())


def prompts(count: int) -> np.ndarray:
    """[count, tokens]"""
    return np.random.default_rng(0).integers(0, VOCAB, (count, PROMPT))


def texts(count: int) -> list[str]:
    """The prompts, as the tokenizer reads them."""
    return [" ".join(f"t{n}" for n in row) for row in prompts(count)]


def rewards(responses: Sequence[str]) -> list[float]:
    """What responses are worth; all of them are of as many tokens."""
    assert all(len(response.split()) == NEW for response in responses)
    return [len(response) / NEW for response in responses]


def words() -> Any:
    """Tokens are the words t0, t1, …, and behind the model's vocabulary those it cannot write."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = Tokenizer(models.WordLevel({f"t{n}": n for n in range(VOCAB)}, unk_token="t0"))
    names.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names.add_special_tokens([END, PADDING])
    return names


def jaxllm_words() -> Any:
    """`words` for us."""
    from jaxllm.tokenizers.hugging_face import HuggingFaceTokenizer

    marks = {"bos_token": END, "eos_token": END, "pad_token": PADDING}
    return HuggingFaceTokenizer(words().to_str(), marks)


def transformers_words() -> Any:
    """`words` for the others."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=words(), eos_token=END, pad_token=PADDING)


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


LLAMA = {"max_position_embeddings": PROMPT + NEW, "bos_token_id": None, "eos_token_id": None}
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": ROWS,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "save_strategy": "no",
}


def trl_grpo(laps: Laps) -> Step:
    """TRL's, by its own batch, `training_step` and optimizer."""
    import datasets
    import torch
    import trl

    folder = tempfile.mkdtemp()  # of which it makes the policy and the reference
    transformers_llama(**LLAMA).save_pretrained(folder)
    transformers_words().save_pretrained(folder)
    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        num_generations=GROUP,
        max_completion_length=NEW,
        temperature=GRPO_TEMPERATURE,
        beta=KL_LOSS,
        max_steps=1000,
        **TRAINING,
    )
    trainer = trl.GRPOTrainer(
        model=folder,
        reward_funcs=lambda completions, **others: rewards(completions),
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": texts(ROWS // GROUP)}),
    )
    trainer.current_gradient_accumulation_steps = 1  # its loop, which is not entered, sets it
    trainer._generate = laps.ending("generation", trainer._generate)
    scored = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = laps.ending("scoring", scored)
    optimizer, model = trainer.create_optimizer(), trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))

    def run() -> None:
        optimizer.zero_grad()
        trainer.training_step(model, batch, None)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return laps.of(run, "updates")


def trl_ppo(laps: Laps) -> Step:
    """TRL's, by its own loop in a thread, which waits after each iteration."""
    sys.path.insert(0, os.environ.get("TRL_PPO", ""))
    import datasets
    import torch
    from transformers import LlamaForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    class LastToken(torch.nn.Module):
        """What stands for a reward model."""

        base_model_prefix = "model"

        def model(self, input_ids: torch.Tensor, **others: Any) -> Any:
            assert input_ids.shape == (ROWS, PROMPT + NEW)
            return SimpleNamespace(hidden_states=[input_ids[..., None] / VOCAB])

        def score(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    begin, ended = threading.Semaphore(0), threading.Semaphore(0)

    class Wait(TrainerCallback):
        """Ends an iteration, and waits for the next to begin."""

        def on_step_end(self, *args: Any, **options: Any) -> None:
            ended.release()
            begin.acquire()

    policy, reference = (transformers_llama(**LLAMA) for _ in range(2))
    value_config = copy.deepcopy(policy.config)
    value_config.num_labels = 1
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        total_episodes=1000 * ROWS,
        response_length=NEW,
        temperature=PPO_TEMPERATURE,
        num_ppo_epochs=EPOCHS,
        kl_coef=KL_REWARD,
        num_sample_generations=0,
        **TRAINING,
    )
    trainer = PPOTrainer(
        config,
        transformers_words(),
        policy,
        reference,
        LastToken(),
        datasets.Dataset.from_dict({"input_ids": prompts(ROWS).tolist()}),
        LlamaForSequenceClassification(value_config),
        callbacks=[Wait()],
    )
    ppo_trainer.batch_generation = laps.ending("generation", ppo_trainer.batch_generation)
    ppo_trainer.masked_whiten = laps.ending("scoring", ppo_trainer.masked_whiten)  # of advantages

    def loop() -> None:
        begin.acquire()
        try:
            trainer.train()
        finally:
            ended.release()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # there `work` tells seconds
            begin.release()
            ended.acquire()
        assert thread.is_alive()

    return laps.of(run, "updates")


def transformers_generation(laps: Laps) -> Step:
    """`generate` of Transformers, with its cache."""
    import torch

    model, tokenizer = transformers_llama(**LLAMA).eval(), transformers_words()
    rows = torch.tensor(prompts(ROWS))
    options = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0, "pad_token_id": VOCAB + 1}

    def run() -> None:
        with torch.inference_mode():
            done = model.generate(rows, attention_mask=torch.ones_like(rows), **options)
        rewards(tokenizer.batch_decode(done[:, PROMPT:]))

    return laps.of(run, "generation")


def tunix_llama(kind: Any = None, tied: bool = True) -> Any:
    """The model in Tunix."""
    from flax import nnx
    from tunix.models.llama3.model import Llama3, ModelConfig

    config = ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCAB,
        embed_dim=WIDTH,
        hidden_dim=MLP,
        num_heads=HEADS,
        head_dim=WIDTH // HEADS,
        num_kv_heads=HEADS,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=tied,
    )
    return (kind or Llama3)(config, rngs=nnx.Rngs(0))


def tunix_grpo(laps: Laps) -> Step:
    """Tunix's."""
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner

    config = GRPOConfig(num_generations=GROUP, beta=KL_LOSS, kl_loss_mode="low_var_kl")
    cluster = tunix_cluster(GRPO_TEMPERATURE)
    return tunix_iteration(laps, GRPOLearner(cluster, config, tunix_rewards), ROWS // GROUP)


def tunix_ppo(laps: Laps) -> Step:
    """Tunix's; the value function is the model with another output matrix."""
    from tunix.models.llama3.model import Llama3
    from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
    from tunix.rl.utils import create_critic_model

    class Critic(Llama3):
        """Takes segments, which it would be given, and are those of a mask that it has."""

        def __call__(self, *args: Any, segment_ids: Any = None, **options: Any) -> Any:
            return super().__call__(*args, **options)

    config = PPOConfig(num_iterations=EPOCHS, beta=KL_REWARD, kl_method="kl")
    critic = create_critic_model(tunix_llama(Critic, tied=False))
    learner = PPOLearner(tunix_cluster(PPO_TEMPERATURE, critic), config, tunix_rewards)
    return tunix_iteration(laps, learner, ROWS)


def tunix_rewards(prompts: Any, completions: list[str], **others: Any) -> list[float]:
    """`rewards`, as Tunix asks for them."""
    return rewards(completions)


def tunix_cluster(temperature: float, critic: Any = None) -> Any:
    """Policy, reference and perhaps a value function, on one device."""
    import jax
    import optax
    from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
    from tunix.rl.rollout.base_rollout import RolloutConfig

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    config = ClusterConfig(
        role_to_mesh=dict.fromkeys(Role, mesh),
        training_config=RLTrainingConfig(
            eval_every_n_steps=1000, actor_optimizer=optimizer, critic_optimizer=optimizer
        ),
        rollout_config=RolloutConfig(
            max_tokens_to_generate=NEW,
            temperature=temperature,
            max_prompt_length=PROMPT,
            kv_cache_size=PROMPT + NEW,
        ),
    )
    models = {"actor": tunix_llama(), "reference": tunix_llama(), "critic": critic}
    return RLCluster(**models, tokenizer=transformers_words(), cluster_config=config)


def tunix_iteration(laps: Laps, learner: Any, count: int) -> Step:
    """A turn of the loop of Tunix's `train`; `count` prompts are asked."""
    import jax

    cluster, scored = learner.rl_cluster, learner._generate_and_compute_advantage
    cluster.generate = laps.ending("generation", cluster.generate)
    learner._generate_and_compute_advantage = laps.ending(
        "scoring", lambda *args: jax.block_until_ready(scored(*args))
    )
    learner._rollout_micro_batch_size = learner._compute_logps_micro_batch_size = count
    batches = itertools.repeat({"prompts": np.array(texts(count))})

    def run() -> None:
        learner._run_global_step(count, count, count, 1, batches, None, False)
        if learner.should_sync_weights:
            cluster.sync_weights()
        else:
            cluster.global_steps += 1

    return laps.of(run, "updates")


def tunix_generation(laps: Laps) -> Step:
    """Tunix's sampler."""
    from tunix.generate.sampler import CacheConfig, Sampler

    cache = CacheConfig(PROMPT + NEW, LAYERS, HEADS, WIDTH // HEADS)
    sampler = Sampler(tunix_llama(), transformers_words(), cache)
    write = functools.partial(sampler, texts(ROWS), NEW, PROMPT, temperature=1.0, top_p=1.0)
    return laps.of(lambda: rewards(write().text), "generation")


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
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        print(f"{name}: {laps}; it held {held:,.0f} MB at the most", file=sys.stderr)
        return

    from jaxllm.reporting.tables import print_table

    names = options.only.split(",") if options.only else list(STEPS[options.task])
    measured = measure(__file__, [f"{options.task}:{name}" for name in names], options.turns)
    seconds = dict(zip(names, measured.values(), strict=True))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        (name, f"{median:.2f}", f"{min(seconds[name]):.2f}", f"{median / medians[names[0]]:.2f}")
        for name, median in medians.items()
    ]
    title = f"{options.task}: {ROWS} x {NEW} new tokens, {2 * options.turns} iterations of each"
    print_table(("", "median s", "fastest s", f"times {names[0]}"), rows, title)


if __name__ == "__main__":
    sys.exit(main())
