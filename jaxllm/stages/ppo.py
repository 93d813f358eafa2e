"""The `ppo` stage: a tuned model, prompts and rewards in, a model that earns more of them out,
with a value function beside it."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from jaxllm.checkpoints.load import load_model, model_config_of, tokenizer_path
from jaxllm.errors import UserError
from jaxllm.inference.reward_model import is_reward_model, reward_mean
from jaxllm.models.config import HeadConfig, ModelConfig, TransformerConfig
from jaxllm.models.families import architecture
from jaxllm.models.head import init_head
from jaxllm.models.transformer import check_length, param_shapes
from jaxllm.objectives.objective import Objective
from jaxllm.objectives.policy_gradient import cut_short
from jaxllm.objectives.ppo import POLICY_TREE, VALUE_TREE, PpoLossConfig, ppo
from jaxllm.rollouts.estimators import GaeConfig, GaeEstimator
from jaxllm.rollouts.learner import Learner
from jaxllm.stages.continued import check_init, model_to_continue
from jaxllm.stages.on_policy import OnPolicyConfig, RlFields, check_policy
from jaxllm.stages.on_policy_run import PolicyModels, judge_of, learn, read_asked, reference_of
from jaxllm.stages.training_run import TrainingRun, train_in, work_directory
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.tokenizer import load_tokenizer
from jaxllm.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class PpoFields(GaeConfig, PpoLossConfig):
    """How advantages come of rewards and values, and the loss.

    The defaults are those of Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593) and Stiennon et
    al. 2020 (https://arxiv.org/abs/2009.01325), as Huang et al. 2024
    (https://arxiv.org/abs/2403.17031) tell them apart.
    """

    max_kl: float = 0.0
    """The updates of a rollout end when one has found the policy further than this from where it
    was at the rollout, in nats of an action (`train/approx_kl`), as OpenAI's Spinning Up ends them
    (https://spinningup.openai.com/en/latest/algorithms/ppo.html); 0: never."""

    def __post_init__(self) -> None:
        GaeConfig.__post_init__(self)
        PpoLossConfig.__post_init__(self)
        if not 0 <= self.max_kl < float("inf"):
            raise ValueError("max_kl: must not be negative")


@dataclasses.dataclass(frozen=True)
class ValueFields:
    """The value function, a model with a head of its own."""

    init: str = ""
    """Run directory of the stage `reward`, or of a model that gets a new head; empty: the reward
    model, as Stiennon et al. 2020 begin it, or without one that of the policy."""
    shared: bool = False
    """Whether policy and value function are one model with two heads, as Ziegler et al. 2019 have
    it, rather than two models, as Stiennon et al. 2020."""

    def __post_init__(self) -> None:
        if self.shared and self.init:
            raise ValueError("init: a value function that shares the policy's model has none")


@dataclasses.dataclass(frozen=True)
class PpoConfig(OnPolicyConfig):
    """A policy that learns from its own responses, and a value function that foretells rewards."""

    stage: str = "ppo"
    """Always `ppo`."""
    rl: RlFields = RlFields(epochs=4, kl_coef=0.05)
    temperature: float = 0.7
    """Divides the logits of policy and reference, where responses are drawn and where they are
    learnt from (Ziegler et al. 2019)."""
    ppo: PpoFields = PpoFields()
    value: ValueFields = ValueFields()
    optimizer: OptimizerConfig = OptimizerConfig(eps=1e-5)

    has_head: ClassVar[bool] = True

    @property
    def needs_reference(self) -> bool:
        return super().needs_reference or self.ppo.kl_loss > 0

    @property
    def trained(self) -> str:
        return self._of_both(self.trained_of_model)

    @property
    def trained_of_model(self) -> str:
        return super().trained

    @property
    def kept(self) -> str:
        return self._of_both(super().kept)

    def _of_both(self, of_policy: str) -> str:
        """The pattern of a policy's parameters with all of the value function's."""
        if self.value.shared:
            return f"head/.*|{of_policy}"
        return f"{VALUE_TREE}/.*|{POLICY_TREE}/(?:{of_policy})"


def run(config: PpoConfig, workdir: Path | None) -> None:
    """Trains policy and value function, and writes samples and report."""
    check_init(config.init, "configs/sft.py")
    directory = work_directory(workdir)
    if config.model.head.outputs:
        raise UserError("config.model.head.outputs: leave it out; config.value.shared tells of it.")
    model, path = model_to_continue(config.init, config.model, directory)
    head = HeadConfig(1) if config.value.shared else HeadConfig()
    config = dataclasses.replace(config, model=dataclasses.replace(model, head=head))
    train_in(directory, config, TokenizerConfig(path=path), _check, _work)


def _check(config: PpoConfig, tokenizer: TokenizerConfig) -> None:
    """Checks, before anything slow, that the models can be trained so.

    Raises:
        UserError: they cannot.
    """
    loaded = load_tokenizer(tokenizer.path)
    if config.value.shared:
        check_policy(config, loaded)
        return
    init = _value_init(config)
    value = architecture(_value_model(config), loaded.vocab_size)
    check_policy(
        config, loaded, lambda policy: {POLICY_TREE: policy, VALUE_TREE: param_shapes(value)}
    )
    check_length(value, config.places, "config.rl.max_prompt and config.max_new_tokens")
    if not value.causal:
        raise UserError(
            f"config.value.init: {init} sees both ways (config.model.causal=False): of a state it "
            "would know what comes after it; give one that does not."
        )
    if load_tokenizer(tokenizer_path(init)).fingerprint != loaded.fingerprint:
        named = "config.value.init: " if config.value.init else "config.reward.init: "
        raise UserError(
            f"{named}{init} has another tokenizer than the policy, and cannot be a value function, "
            "which reads its tokens; give one with the same as config.value.init."
        )


def _value_init(config: PpoConfig) -> str:
    return config.value.init or config.reward.init or config.init


def _value_model(config: PpoConfig) -> ModelConfig:
    """The value function's model, computed as the policy's."""
    recorded = model_config_of(_value_init(config))
    computed = {
        name: getattr(config.model, name)
        for name in ("dtype", "reduction_dtype", "remat", "attention", "param_dtype")
    }
    return dataclasses.replace(recorded, head=HeadConfig(1), top_layers=0, **computed)


def _work(run: TrainingRun[PpoConfig]) -> dict[str, float]:
    """The run itself; its scores."""
    config = run.config
    asked = read_asked(run)
    judge = judge_of(run, asked.template)
    vocab_size = asked.template.tokenizer.vocab_size
    model = architecture(config.model, vocab_size)
    shared = config.value.shared
    value = None if shared else architecture(_value_model(config), vocab_size)
    kept = ["old_log_probs", *(["reference_log_probs"] if config.ppo.kl_loss else [])]
    writer_of = (lambda params: params) if shared else (lambda params: params[POLICY_TREE])
    models = PolicyModels(
        Learner(
            model,
            value,
            has_values=True,
            reference=reference_of(config, writer_of),
            needs_old=True,
            temperature=config.temperature,
        ),
        GaeEstimator(config.ppo, config.needs_reference, tuple(kept)),
        _objective(config, model, value),
        None if value is None else lambda: _both(run, model, value),
        run.param_shapes(model)
        if value is None
        else {POLICY_TREE: run.param_shapes(model), VALUE_TREE: param_shapes(value)},
        writer_of,
        {} if value is None else {f"{POLICY_TREE}/": model, f"{VALUE_TREE}/": value},
        None if value is None else lambda: {POLICY_TREE: run.loaded_params(model)},
    )
    return learn(run, asked, judge, model, models)


def _both(
    run: TrainingRun[PpoConfig], model: TransformerConfig, value: TransformerConfig
) -> dict[str, Any]:
    """The parameters that both models begin with."""
    return {POLICY_TREE: run.loaded_params(model), VALUE_TREE: _value_params(run, value)}


def _objective(
    config: PpoConfig, model: TransformerConfig, value: TransformerConfig | None
) -> Objective:
    made = ppo(model, value, config.ppo, config.temperature, config.max_new_tokens)
    if not config.ppo.max_kl:
        return made
    return made._replace(remember=cut_short(config.ppo.max_kl))


def _value_params(run: TrainingRun[PpoConfig], value: TransformerConfig) -> dict[str, Any]:
    """The parameters that the value function begins with: those of a reward model, whose mean is
    taken from the bias, or of another model with a head that gives 0."""
    config = run.config
    init, wanted = _value_init(config), _value_model(config)
    params = load_model(init, run.mesh, wanted).params
    if not is_reward_model(init):
        return {name: leaf for name, leaf in params.items() if name != "head"} | init_head(value)
    bias = params["head"]["bias"] - reward_mean(init)
    return params | {"head": params["head"] | {"bias": bias}}
