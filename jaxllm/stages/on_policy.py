"""What stages have alike in which a policy learns from its own responses: their fields, and what
is checked of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxllm.checkpoints.load import model_config_of, tokenizer_path
from jaxllm.data.cleaning import CleaningConfig
from jaxllm.data.config import SourcesConfig
from jaxllm.data.rankings import layout_of
from jaxllm.errors import UserError
from jaxllm.inference.reward_model import RewardModel, is_reward_model
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import architecture
from jaxllm.models.transformer import check_length, param_shapes
from jaxllm.rollouts.config import RolloutConfig
from jaxllm.rollouts.judging import Judge, make_judge
from jaxllm.stages.continued import HOW_COMPUTED, check_init, with_pairs
from jaxllm.stages.fields import ModelTrainingFields, WritingFields
from jaxllm.stages.fit import check_patterns, check_trained
from jaxllm.stages.reference import NOT_THE_REFERENCE
from jaxllm.tokenizers.tokenizer import Tokenizer, load_tokenizer

_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class RlFields(RolloutConfig):
    """How responses are drawn, and what they are worth."""

    template: str = ""
    """By which prompts are laid out: `bos_separated`, `chatml`, `llama3`, or a file with a Jinja
    template; empty: that by which `init` was tuned, else `bos_separated`."""
    slots: int = 64
    """Responses that are written at once."""
    calculator: bool = False
    """Whether a calculator goes on with `<<12*4=` by `48>>`, which is not learnt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slots < 1:
            raise ValueError("slots: must be at least 1")


@dataclasses.dataclass(frozen=True)
class ReferenceFields:
    """What the policy is held to."""

    init: str = ""
    """Run directory or Hugging Face folder; empty: that of the policy. With low-rank pairs this
    is the same base without them, which takes no memory."""
    dtype: str = "float32"
    """In which its parameters are held: `float32` or `bfloat16`."""

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)


@dataclasses.dataclass(frozen=True)
class RewardModelFields:
    """The reward model, called `reward_model` among the rewards."""

    init: str = ""
    """Run directory of the stage `reward`."""
    dtype: str = "float32"
    """In which its parameters are held: `float32` or `bfloat16`."""
    retokenise: bool = False
    """Take one with another tokenizer than the policy's, which is shown the text of responses."""

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)


def _check_dtype(dtype: str) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: must be one of {', '.join(_DTYPES)}; was {dtype!r}")


@dataclasses.dataclass(frozen=True)
class OnPolicyConfig(ModelTrainingFields, WritingFields):
    """A policy that learns from its own responses."""

    init: str = ""
    """Run directory or Hugging Face folder to take parameters, model and tokenizer from."""
    data: SourcesConfig = SourcesConfig(
        train="builtin:arithmetic",
        # What many prompts share would make copies of them.
        cleaning=CleaningConfig(near_duplicates=0.0),
    )
    rl: RlFields = RlFields()
    rewards: str = ""
    """What responses are worth, as `numeric:1,format:0.2`: docs/rewards.md. `reward_model` is that
    of `reward.init`; empty: it alone."""
    reward: RewardModelFields = RewardModelFields()
    reference: ReferenceFields = ReferenceFields()

    def __post_init__(self) -> None:
        ModelTrainingFields.__post_init__(self)
        WritingFields.__post_init__(self)
        if self.rl.overlong_buffer > self.max_new_tokens:
            raise ValueError(
                f"rl.overlong_buffer: {self.rl.overlong_buffer} tokens are more than the "
                f"{self.max_new_tokens} of max_new_tokens, and every response would be too long"
            )
        if self.temperature <= 0:
            raise ValueError("temperature: must be positive; responses are drawn")
        for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
            default = getattr(WritingFields(), name)
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}: the policy learns from what it would write without it; leave it at "
                    f"{default}"
                )
        if self.batch_size * self.rl.minibatches % self.rl.group_size:
            raise ValueError(
                f"rl.group_size: {self.rl.group_size} does not divide the "
                f"{self.batch_size * self.rl.minibatches} responses of a rollout (batch_size times "
                "rl.minibatches)"
            )
        changed = self.lora.rank and self.train.trainable not in (".*", "lora")
        if self.reference_is_base and changed:
            raise ValueError(
                "train.trainable: changes the base, which is the reference too; leave it out, or "
                "give reference.init"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether the policy is compared with a reference."""
        return self.rl.kl_coef > 0

    @property
    def reference_is_base(self) -> bool:
        """Whether the reference is the policy without its pairs."""
        return self.needs_reference and self.lora.rank > 0 and not self.reference.init

    @property
    def places(self) -> int:
        """Tokens of a prompt and its response at most."""
        return self.rl.max_prompt + self.max_new_tokens

    @property
    def trained(self) -> str:
        return f"{NOT_THE_REFERENCE}(?:{super().trained})"

    @property
    def kept(self) -> str:
        return f"{NOT_THE_REFERENCE}(?:{super().kept})"  # it can be had from its `init` again


def check_policy(
    config: OnPolicyConfig,
    tokenizer: Tokenizer,
    shapes_of: Callable[[dict[str, Any]], dict[str, Any]] = lambda policy: policy,
) -> None:
    """Checks, before anything slow, that the model can be trained so.

    Args:
        config: of the stage.
        tokenizer: of the policy.
        shapes_of: all parameters, of the policy's.

    Raises:
        UserError: it cannot.
    """
    check_init(config.init, "configs/sft.py")
    if not config.rewards and not config.reward.init:
        raise UserError(
            "config.rewards: say what responses are worth, as numeric or exact_match, or give a "
            "reward model as config.reward.init."
        )
    if reference := config.reference.init:
        if not config.needs_reference:
            raise UserError(
                "config.reference.init: nothing holds the policy to it; give config.rl.kl_coef or "
                "that of kl_loss, or leave it out."
            )
        _check_same(config.model, model_config_of(reference))
        if load_tokenizer(tokenizer_path(reference)).fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"config.reference.init: {reference} has another tokenizer than the policy, and "
                "cannot read its tokens; give one with the same."
            )
    if reward := config.reward.init:
        model_config_of(reward)
        if not is_reward_model(reward):
            raise UserError(f"config.reward.init: {reward} is no run of the stage reward.")
    model = architecture(config.model, tokenizer.vocab_size)
    if not model.causal:
        raise UserError(
            "config.init: its model sees both ways (config.model.causal=False), and cannot write; "
            "give one that does."
        )
    check_length(model, config.places, "config.rl.max_prompt and config.max_new_tokens")
    policy = with_pairs(config, param_shapes(model))
    check_trained(config, policy, config.trained_of_model)
    check_patterns(config, shapes_of(policy))
    layout_of(tokenizer, config.rl.template, "config.rl.template")
    parsed_rewards(config, None)


def _check_same(policy: ModelConfig, reference: ModelConfig) -> None:
    """Checks that a reference is computed as the policy is.

    Raises:
        UserError: it is not; parameters of other models may have the same shapes.
    """
    for field in dataclasses.fields(ModelConfig):
        own, other = getattr(policy, field.name), getattr(reference, field.name)
        if field.name not in HOW_COMPUTED and own != other:
            raise UserError(
                f"config.reference.init: its model has {field.name} {other!r}, and the policy's "
                f"{own!r}; give a reference of the same model."
            )


def parsed_rewards(
    config: OnPolicyConfig, model: RewardModel | None, reads_ids: bool = False
) -> Judge:
    """What judges responses.

    Raises:
        UserError: `rewards` is wrong.
    """
    return make_judge(
        config.rl, config.rewards, config.max_new_tokens, model, reads_ids, bool(config.reward.init)
    )
