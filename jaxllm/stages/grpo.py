"""The `grpo` stage: a tuned model, prompts and rewards in, a model that earns more of them out."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxllm.models.families import architecture
from jaxllm.objectives.grpo import grpo
from jaxllm.objectives.policy_gradient import PolicyLossConfig
from jaxllm.rollouts.estimators import GroupConfig, GroupEstimator
from jaxllm.rollouts.learner import Learner
from jaxllm.stages.continued import check_init, model_to_continue
from jaxllm.stages.on_policy import OnPolicyConfig, RlFields, check_policy
from jaxllm.stages.on_policy_run import PolicyModels, judge_of, learn, read_asked, reference_of
from jaxllm.stages.training_run import TrainingRun, train_in, work_directory
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class GrpoFields(GroupConfig, PolicyLossConfig):
    """How responses are compared, and the loss."""

    def __post_init__(self) -> None:
        GroupConfig.__post_init__(self)
        PolicyLossConfig.__post_init__(self)


@dataclasses.dataclass(frozen=True)
class GrpoConfig(OnPolicyConfig):
    """A policy that learns by comparing its responses to the same prompt."""

    stage: str = "grpo"
    """Always `grpo`."""
    rl: RlFields = RlFields(group_size=8)
    grpo: GrpoFields = GrpoFields()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rl.group_size < 2 and self.grpo.advantages != "global":
            raise ValueError(
                f"rl.group_size: {self.grpo.advantages} compares the responses to a prompt, and "
                "needs two at least; 8 are usual"
            )
        if self.grpo.filter_groups and self.rl.kl_coef:
            raise ValueError(
                "grpo.filter_groups: with rl.kl_coef responses of equal scores still differ by "
                "their divergence; hold the policy by grpo.kl_loss, or leave one of them out"
            )
        if self.rl.group_size < 2 and self.grpo.filter_groups:
            raise ValueError(
                "grpo.filter_groups: a group of one has no spread, and every one would be left out"
            )

    @property
    def needs_reference(self) -> bool:
        return super().needs_reference or self.grpo.kl_loss > 0


def run(config: GrpoConfig, workdir: Path | None) -> None:
    """Trains the policy on its own responses, and writes samples and report."""
    check_init(config.init, "configs/sft.py")
    directory = work_directory(workdir)
    model, path = model_to_continue(config.init, config.model, directory)
    config = dataclasses.replace(config, model=model)
    train_in(directory, config, TokenizerConfig(path=path), _check, _work)


def _check(config: GrpoConfig, tokenizer: TokenizerConfig) -> None:
    check_policy(config, load_tokenizer(tokenizer.path))


def _work(run: TrainingRun[GrpoConfig]) -> dict[str, float]:
    """The run itself; its scores."""
    config = run.config
    asked = read_asked(run)
    judge = judge_of(run, asked.template)
    model = architecture(config.model, asked.template.tokenizer.vocab_size)
    reuses = config.rl.updates > 1
    kept = [*(["old_log_probs"] if reuses else [])]
    kept += ["reference_log_probs"] if config.grpo.kl_loss else []
    models = PolicyModels(
        Learner(
            model,
            value=None,
            has_values=False,
            reference=reference_of(config, _itself),
            needs_old=reuses or config.rl.kl_coef > 0,
            temperature=config.temperature,
        ),
        GroupEstimator(config.grpo, config.rl.group_size, config.needs_reference, tuple(kept)),
        grpo(model, config.grpo, config.temperature, config.max_new_tokens),
        initial_params=None,
        shapes=run.param_shapes(model),
        writer_of=_itself,
    )
    return learn(run, asked, judge, model, models)


def _itself(params: Any) -> Any:
    return params
