"""Scaling laws in closed form, with the constants that were published.

N is a number of parameters, D of training tokens, C of FLOPs; losses are in nats a token. Which
parameters N counts is a convention of each law, told with its constants. All functions take numbers
or NumPy arrays, which broadcast.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

FLOPS_PER_PARAMETER = 6.0
"""C ≈ 6 N D: two for a multiply-add, and three passes (forward, and backward twice)."""
PETAFLOP_DAY = 1e15 * 24 * 3600
"""The unit of compute of Kaplan et al., in FLOPs."""

Values = float | np.ndarray

_MOST = 300.0  # of a logarithm whose exponential is multiplied with others


class LossParts(NamedTuple):
    """What a loss is made of, in nats a token."""

    irreducible: Values
    """What no model and no amount of data takes away."""
    model: Values
    """What the model is too small for."""
    data: Values
    """What it has seen too little for."""


class Allocation(NamedTuple):
    """How a budget is spent."""

    parameters: Values
    tokens: Values

    @property
    def tokens_per_parameter(self) -> Values:
        """D / N."""
        return self.tokens / self.parameters


@dataclasses.dataclass(frozen=True)
class ParametricLaw:
    """L(N, D) = E + A/N^α + B/D^β (Hoffmann et al. 2022, equation 2,
    https://arxiv.org/abs/2203.15556)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: Values, tokens: Values) -> Values:
        """L(N, D)."""
        return sum(self.parts(parameters, tokens))

    def parts(self, parameters: Values, tokens: Values) -> LossParts:
        """The three terms."""
        return LossParts(
            self.E + 0.0 * parameters * tokens,
            self.A / parameters**self.alpha + 0.0 * tokens,
            self.B / tokens**self.beta + 0.0 * parameters,
        )

    @property
    def exponents(self) -> tuple[float, float]:
        """a and b of N_opt ∝ C^a and D_opt ∝ C^b."""
        return self.beta / (self.alpha + self.beta), self.alpha / (self.alpha + self.beta)

    def optimum(self, flops: Values) -> Allocation:
        """The N and D of least loss among those of C = 6 N D (equation 4 there).

        N = G (C/6)^a and D = (C/6)^b / G, with G = (α A / (β B))^(1/(α+β)); as logarithms, as a law
        of runs that tell little may have any G.

        Args:
            flops: C.
        """
        a, b = self.exponents
        products = np.log(flops / FLOPS_PER_PARAMETER)
        return Allocation(
            np.exp(self._log_scale + a * products), np.exp(b * products - self._log_scale)
        )

    @property
    def _log_scale(self) -> float:
        """log G."""
        log_ratio = np.log(self.alpha * self.A) - np.log(self.beta * self.B)
        return float(np.clip(log_ratio / (self.alpha + self.beta), -_MOST, _MOST))

    def optimum_of_tokens(self, tokens: Values) -> Values:
        """N of the optimum whose D is `tokens`."""
        a, b = self.exponents
        return np.exp(self._log_scale + (np.log(tokens) + self._log_scale) * (a / b))


@dataclasses.dataclass(frozen=True)
class RepeatingLaw:
    """A parametric law for text that is read several times (Muennighoff et al. 2023, section 3.1
    and equations 5 and 6, https://arxiv.org/abs/2305.16264).

    Of U different tokens read R + 1 times, D' = U + U r (1 - e^(-R/r)) count, r = `of_tokens`. As
    many parameters as are best for U are N_U; beyond, N' = N_U + N_U n (1 - e^(-R_N/n)) count, with
    N = N_U (R_N + 1) and n = `of_parameters`.
    """

    law: ParametricLaw
    of_tokens: float
    of_parameters: float

    def loss(self, parameters: Values, tokens: Values, unique: Values) -> Values:
        """L of `tokens` read of which `unique` are different."""
        return sum(self.parts(parameters, tokens, unique))

    def parts(self, parameters: Values, tokens: Values, unique: Values) -> LossParts:
        """The three terms."""
        return self.law.parts(*self.effective(parameters, tokens, unique))

    @property
    def exponents(self) -> tuple[float, float]:
        """a and b of N_opt ∝ C^a and D_opt ∝ C^b where no token is read twice."""
        return self.law.exponents

    def effective(self, parameters: Values, tokens: Values, unique: Values) -> Allocation:
        """The N' and D' that parameters and tokens count."""
        counted = np.minimum(tokens, unique)
        # As many as a budget of the different tokens alone is best spent with.
        best = self.law.optimum_of_tokens(counted)
        return Allocation(
            effective(parameters, best, self.of_parameters),
            effective(tokens, counted, self.of_tokens),
        )

    def optimum(self, flops: float, unique: float) -> Allocation:
        """The N and D of least loss among those of C = 6 N D where only `unique` tokens differ;
        found by search, as there is no closed form."""
        free = float(self.law.optimum(flops).parameters)

        def loss(log_parameters: float) -> float:
            parameters = np.exp(log_parameters)
            tokens = flops / (FLOPS_PER_PARAMETER * parameters)
            return float(self.loss(parameters, tokens, min(unique, tokens)))

        around = np.log(free) + np.linspace(-12, 12, 97)
        best = around[np.argmin([loss(value) for value in around])]
        step = around[1] - around[0]
        found = minimize_scalar(loss, bounds=(best - step, best + step), method="bounded")
        parameters = float(np.exp(found.x))
        return Allocation(parameters, flops / (FLOPS_PER_PARAMETER * parameters))


def effective(total: Values, first: Values, half_life: float) -> Values:
    """What `total` counts of which only `first` is new: all of that, and of what comes after less
    and less, at most `half_life` times as much again."""
    excess = np.maximum(total / first - 1, 0)
    return np.minimum(total, first) + first * half_life * -np.expm1(-excess / half_life)


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """L(x) = (x₀/x)^exponent."""

    scale: float
    """x₀."""
    exponent: float

    def loss(self, x: Values) -> Values:
        """L(x)."""
        return (self.scale / x) ** self.exponent


@dataclasses.dataclass(frozen=True)
class KaplanLaw:
    """The laws of Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, of non-embedding
    parameters."""

    of_parameters: PowerLaw
    """L(N), trained to convergence on enough text (equation 1.1)."""
    of_tokens: PowerLaw
    """L(D), of a large model stopped early (equation 1.2)."""
    of_compute: PowerLaw
    """L(C), of C in FLOPs spent as well as can be (equation 1.3)."""
    joint_parameters: PowerLaw
    joint_tokens: PowerLaw
    """Of L(N, D) (equation 1.5, fitted in table 2)."""
    best_parameters: tuple[float, float]
    """N_opt = k C^p of C in FLOPs (table 3)."""

    def loss(self, parameters: Values, tokens: Values) -> Values:
        """L(N, D) = ((N_c/N)^(α_N/α_D) + D_c/D)^α_D (equation 1.5)."""
        ours, theirs = self.joint_parameters, self.joint_tokens
        of_model = (ours.scale / parameters) ** (ours.exponent / theirs.exponent)
        return (of_model + theirs.scale / tokens) ** theirs.exponent

    def optimum(self, flops: Values) -> Allocation:
        """N by the fitted power law, and the D that remains of C = 6 N D."""
        scale, exponent = self.best_parameters
        parameters = scale * flops**exponent
        return Allocation(parameters, flops / (FLOPS_PER_PARAMETER * parameters))


PARAMETRIC: Mapping[str, ParametricLaw] = {
    # Hoffmann et al. 2022, equation 10 (approach 3), rounded as there; N has the embeddings in it.
    "chinchilla": ParametricLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
    # The same less rounded, as the source of the paper has it (told by Besiroglu et al. 2024).
    "chinchilla_unrounded": ParametricLaw(E=1.6934, A=406.4, B=410.7, alpha=0.3392, beta=0.2849),
    # Besiroglu et al. 2024, https://arxiv.org/abs/2404.10102: the same data, read off the plot.
    "besiroglu": ParametricLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
}
"""Constants of `ParametricLaw` by name."""

REPEATING: Mapping[str, RepeatingLaw] = {
    # Muennighoff et al. 2023, appendix A: α = β by their choice; log E, log A and log B are told.
    "muennighoff": RepeatingLaw(
        ParametricLaw(
            E=float(np.exp(0.6254804)),
            A=float(np.exp(6.255414)),
            B=float(np.exp(7.3049974)),
            alpha=0.3526596,
            beta=0.3526596,
        ),
        of_tokens=15.387756,
        of_parameters=5.309743,
    ),
}
"""Constants of `RepeatingLaw` by name."""

# Kaplan et al. 2020: section 1.2, table 2 and table 3.
KAPLAN = KaplanLaw(
    of_parameters=PowerLaw(8.8e13, 0.076),
    of_tokens=PowerLaw(5.4e13, 0.095),
    of_compute=PowerLaw(3.1e8 * PETAFLOP_DAY, 0.050),
    joint_parameters=PowerLaw(6.4e13, 0.076),
    joint_tokens=PowerLaw(1.8e13, 0.103),
    best_parameters=(1.3e9 / PETAFLOP_DAY**0.73, 0.73),
)
