"""How a policy's responses are drawn, what they are worth, and how often they are learnt from."""

import dataclasses
import math

MISSING_END = ("keep", "replace", "subtract")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """What every on-policy algorithm has; `RolloutFields` of a stage add its own."""

    group_size: int = 1
    """Responses to each prompt."""
    epochs: int = 1
    """How often a rollout is gone through,"""
    minibatches: int = 1
    """in how many updates each time: a rollout has batch_size times as many responses."""
    max_prompt: int = 128
    """Tokens of a prompt at most; prompts that are longer are left out."""
    kl_coef: float = 0.0
    """β: what each action's log π - log π_ref takes away from its reward (Ziegler et al. 2019,
    section 2.2, https://arxiv.org/abs/1909.08593)."""
    kl_target: float = 0.0
    """What β is led towards: nats of a whole response, as Ziegler et al. 2019, section 2.2
    (https://arxiv.org/abs/1909.08593) do; 0: β stays as it is."""
    kl_horizon: float = 10_000.0
    """Over how many responses β follows."""
    missing_end: str = "keep"
    """What a response is worth that does not end: `keep`, what it is worth; `replace`, -1 times
    `missing_end_penalty`, as Ziegler et al. 2019 do (Huang et al. 2024,
    https://arxiv.org/abs/2403.17031); `subtract`, that much less."""
    missing_end_penalty: float = 1.0
    overlong_buffer: int = 0
    """Over the last so many tokens up to `max_new_tokens` the score falls by up to 1 (the soft
    punishment of Yu et al. 2025, section 3.4, https://arxiv.org/abs/2503.14476); 0: it does not."""
    eval_temperature: float = 0.0
    """Of answers to what is held out; 0 takes the likeliest token."""
    eval_samples: int = 1
    """Answers to each held-out prompt; of several it is told too what the best of them is worth
    (pass@k, of a reward of 0 and 1), and what the commonest, by each reward."""

    shown: int = 3
    """Held-out prompts whose answers, with their scores, are shown in `samples.md` at each
    evaluation."""

    def __post_init__(self) -> None:
        for name in ("group_size", "epochs", "minibatches", "max_prompt", "eval_samples", "shown"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1")
        for name in (
            "kl_coef",
            "kl_target",
            "missing_end_penalty",
            "overlong_buffer",
            "eval_temperature",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must not be negative")
        if not 0 < self.kl_horizon < math.inf:
            raise ValueError("kl_horizon: must be positive")
        if self.eval_samples > 1 and not self.eval_temperature:
            raise ValueError(
                "eval_samples: at eval_temperature 0 all of them are the same; give one of 1, say"
            )
        if self.kl_target and not self.kl_coef:
            raise ValueError("kl_target: kl_coef begins at 0 and would stay there; give it too")
        if self.missing_end not in MISSING_END:
            raise ValueError(
                f"missing_end: must be one of {', '.join(MISSING_END)}; was {self.missing_end!r}"
            )

    @property
    def updates(self) -> int:
        """Updates of a rollout."""
        return self.epochs * self.minibatches
