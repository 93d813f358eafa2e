"""The optimizer and the learning-rate schedules, both from Optax."""

import dataclasses
import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxllm import trees
from jaxllm.training.adafactor import adafactor
from jaxllm.training.learning_rates import parse_factors
from jaxllm.training.moments import stored_in

# Weight decay is for matrices; norm scales, biases and position embeddings are left alone.
_DECAYED = r"(.*/)?(kernel|embedding|output)(_lora_[ab])?"
_MATRICES = r"(.*/)?(kernel|embedding|output|position_embedding)(_lora_[ab])?"
# Muon is for the matrices inside layers; embedding and output follow Adam.
_ORTHOGONALISED = r"(.*/)?kernel"
_MUON_MOMENTUM = 0.95
# Root mean square of AdamW's updates, which Muon's are brought to (Liu et al. 2025, section 2.2).
_ADAM_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters move."""

    name: str = "adamw"
    """`adamw` (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101);
    `adafactor` (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235): almost no memory, for it
    keeps no first moment and of the second one means of rows and columns;
    `lion` (Chen et al. 2023, https://arxiv.org/abs/2302.06675): half the memory of `adamw`;
    `muon` (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): for matrices inside
    layers, with Nesterov momentum of 0.95, and `adamw` for all else."""
    learning_rate: float = 1e-3
    """Peak of the schedule. Usual for `adamw` are 1e-4 (large models) to 3e-3 (small ones), and the
    same for `adafactor` and `muon`; for `lion` a tenth to a third of it, with 3 to 10 times the
    weight decay."""
    learning_rates: str = ""
    """Factors by parameter, `PATTERN:FACTOR,…` over whole parameter paths, of which the first that
    matches counts (`embedding:0.1,.*norm/scale:2`); others have 1, and 0 leaves a parameter as it
    is."""
    layer_decay: float = 1.0
    """Factor of the rate from each layer to the one below it: under 1, the lower a layer the less
    it moves, and the embedding the least; usual in fine-tuning are 0.8 to 0.95."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""
    beta1: float = 0.9
    """Decay of Adam's first moment; in Lion, the momentum's share of the direction. `adafactor`
    reads neither this nor the next."""
    beta2: float = 0.95
    """Decay of Adam's second moment, and of Lion's momentum (0.98 or 0.99 is usual there)."""
    eps: float = 1e-8
    """Added to the root of Adam's second moment; of `adamw` and `muon`."""
    moment_dtype: str = "float32"
    """What moments are stored in: `float32`, or `bfloat16` for half the memory, rounded by chance
    so that they are right in the mean. Those of `adafactor` are small, and stay float32."""
    schedule: str = "cosine"
    """`cosine`, `linear`, `wsd` (warm-up, stable, decay) or `constant`."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from 0."""
    final_fraction: float = 0.1
    """Share of the peak that `cosine`, `linear` and `wsd` end at."""
    decay_fraction: float = 0.2
    """Share of all steps over which `wsd` decays, linearly, at the end."""

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: must be one of {', '.join(known)}, "
                    f"and was given {getattr(self, name)!r}"
                )
        for name in ("learning_rate", "weight_decay", "clip_norm", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: must be in [0, 1)")
        for name in ("final_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must be in [0, 1]")
        if not 0 < self.layer_decay <= 1:
            raise ValueError("layer_decay: must be in (0, 1]")
        if self.eps <= 0:
            raise ValueError("eps: must be positive")
        self._check_unread()
        if self.name == "adafactor" and self.moment_dtype != "float32":
            raise ValueError("moment_dtype: must be float32 for adafactor, whose moments are small")
        parse_factors(self.learning_rates)

    def _check_unread(self) -> None:
        for option, (chooser, readers) in _READERS.items():
            chosen, default = getattr(self, chooser), getattr(type(self), option)
            if chosen not in readers and getattr(self, option) != default:
                raise ValueError(
                    f"{option}: {chosen} does not read it, but only {', '.join(readers)}; "
                    f"leave it at {default:g}"
                )


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step, over a run of `steps` steps.

    Every schedule warms up linearly, reaching the peak at step `warmup_steps`, and all but
    `constant` end at `final_fraction` of the peak.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    after_warmup = max(1, steps - config.warmup_steps)
    rest = _SCHEDULES[config.schedule](config, peak, final, after_warmup, steps)
    if not config.warmup_steps:
        return rest
    # From 1/(n+1) of the peak, so that the first step is not spent at rate 0.
    warmup = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, config.warmup_steps)
    return optax.join_schedules([warmup, rest], [config.warmup_steps])


def _cosine(
    config: OptimizerConfig, peak: float, final: float, after_warmup: int, steps: int
) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, after_warmup, alpha=config.final_fraction)


def _linear(
    config: OptimizerConfig, peak: float, final: float, after_warmup: int, steps: int
) -> optax.Schedule:
    return optax.linear_schedule(peak, final, after_warmup)


def _wsd(
    config: OptimizerConfig, peak: float, final: float, after_warmup: int, steps: int
) -> optax.Schedule:
    """Warm-up, stable, decay (Hu et al. 2024, https://arxiv.org/abs/2404.06395)."""
    decay = min(after_warmup, max(1, round(config.decay_fraction * steps)))
    return optax.linear_schedule(peak, final, decay, transition_begin=after_warmup - decay)


def _constant(
    config: OptimizerConfig, peak: float, final: float, after_warmup: int, steps: int
) -> optax.Schedule:
    return optax.constant_schedule(peak)


_SCHEDULES = {"cosine": _cosine, "linear": _linear, "wsd": _wsd, "constant": _constant}


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Gradients to the *direction* of the update; the step multiplies it by the learning rate.

    The rate is kept out, so that it follows the state's step (which also counts skipped steps)
    and can differ by path. Gradients and parameters are float32 in `update`, which also takes a
    `key` to round moments by; `init` takes parameters of any dtype.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    optimizer = optax.chain(
        clip,
        stored_in(config.moment_dtype, _OPTIMIZERS[config.name](config)),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )

    def init(params: Any) -> Any:  # else moments would have the dtype of their parameters
        return optimizer.init(optax.tree.cast(params, jnp.float32))

    return optax.GradientTransformationExtraArgs(init, optimizer.update)


def decayed(params: trees.Tree) -> Any:
    """The tree that says which parameters weight decay applies to: the matrices."""
    return _matching(_DECAYED, params)


def _adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.eps)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    return adafactor(_MATRICES)


def _lion(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_lion(config.beta1, config.beta2)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Momentum made orthogonal by Newton-Schulz steps, for the matrices inside layers.

    Updates are scaled to the size of AdamW's (Liu et al. 2025, https://arxiv.org/abs/2502.16982),
    so that one learning rate and one weight decay serve all parameters.
    """

    def dimensions(params: Any) -> Any:  # kernels are [..., in, out]
        numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        return jax.tree.map(lambda _: numbers, params)

    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=_MUON_MOMENTUM, weight_dimension_numbers=dimensions),
        optax.stateless_with_tree_map(
            lambda update, _: _ADAM_RMS * max(update.shape[-2:]) ** 0.5 * update
        ),
    )
    return optax.chain(
        optax.masked(muon, lambda params: _matching(_ORTHOGONALISED, params)),
        optax.masked(_adamw(config), lambda params: _matching(_ORTHOGONALISED, params, False)),
    )


_OPTIMIZERS = {"adamw": _adamw, "adafactor": _adafactor, "lion": _lion, "muon": _muon}
_CHOICES: dict[str, Collection[str]] = {
    "name": _OPTIMIZERS,
    "schedule": _SCHEDULES,
    "moment_dtype": ("float32", "bfloat16"),
}
# Options that not every optimizer or schedule reads: the field that chooses, and which do.
_READERS = {
    "beta1": ("name", ("adamw", "lion", "muon")),
    "beta2": ("name", ("adamw", "lion", "muon")),
    "eps": ("name", ("adamw", "muon")),
    "decay_fraction": ("schedule", ("wsd",)),
}


def _matching(pattern: str, params: trees.Tree, matching: bool = True) -> Any:
    return trees.map_with_paths(
        lambda path, _: bool(re.fullmatch(pattern, path)) == matching, params
    )
