"""Iterations of benchmarks/rollouts.py by TRL and Tunix, and generation by Transformers."""

import contextlib
import copy
import functools
import io
import itertools
import os
import sys
import tempfile
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
from in_turn import Step
from llama import HEADS, LAYERS, VOCAB, WIDTH, transformers_llama, tunix_llama
from rollout_work import (
    EPOCHS,
    GROUP,
    GRPO_TEMPERATURE,
    KL_LOSS,
    KL_REWARD,
    NEW,
    PPO_TEMPERATURE,
    PROMPT,
    ROWS,
    Laps,
    prompts,
    rewards,
    texts,
    transformers_words,
)

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
