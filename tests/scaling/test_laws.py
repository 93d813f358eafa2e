"""Laws in closed form: against what their papers say of them, and against numbers."""

import numpy as np
import pytest

from jaxllm.scaling.laws import (
    FLOPS_PER_PARAMETER,
    KAPLAN,
    PARAMETRIC,
    PETAFLOP_DAY,
    REPEATING,
    ParametricLaw,
    effective,
)

GOPHER = 5.76e23
"""FLOPs of Gopher and Chinchilla."""


@pytest.mark.parametrize("name", PARAMETRIC)
@pytest.mark.parametrize("flops", [1e18, GOPHER])
def test_the_optimum_is_the_least_of_what_can_be_had(name, flops):
    law = PARAMETRIC[name]
    found = law.optimum(flops)
    assert FLOPS_PER_PARAMETER * found.parameters * found.tokens == pytest.approx(flops)
    # On a grid so fine that its least is as near as single numbers tell.
    sizes = found.parameters * np.exp(np.linspace(-0.1, 0.1, 20_001))
    losses = law.loss(sizes, flops / (FLOPS_PER_PARAMETER * sizes))
    assert sizes[np.argmin(losses)] == pytest.approx(found.parameters, rel=1e-4)


def test_the_budget_of_gopher_by_the_rounded_constants():
    """Where the paper's table has 40 B for the same approach (docs/scaling.md)."""
    found = PARAMETRIC["chinchilla"].optimum(GOPHER)
    assert found.parameters == pytest.approx(32.2e9, rel=0.01)
    # As good as 20 tokens a parameter, of the fit that was made again.
    assert PARAMETRIC["besiroglu"].optimum(GOPHER).tokens_per_parameter == pytest.approx(18.4, 0.01)


def test_the_parts_of_a_loss_are_the_loss():
    law = ParametricLaw(1.5, 400.0, 300.0, 0.3, 0.25)
    sizes, tokens = np.asarray([[1e6], [1e9]]), np.asarray([1e8, 1e10, 1e12])
    parts = law.parts(sizes, tokens)
    assert all(part.shape == (2, 3) for part in parts)
    np.testing.assert_allclose(sum(parts), law.loss(sizes, tokens))
    np.testing.assert_allclose(parts.irreducible, 1.5)
    assert law.loss(1e30, 1e40) == pytest.approx(1.5, abs=1e-6)
    # Each has what is wanting of it alone.
    np.testing.assert_allclose(parts.model[:, 0], parts.model[:, 2])
    np.testing.assert_allclose(parts.data[0], parts.data[1])


def test_the_laws_of_kaplan():
    """Points that can be read off figures 1 and 2 of the paper."""
    assert KAPLAN.of_parameters.loss(1e9) == pytest.approx(2.38, abs=0.02)
    assert KAPLAN.of_tokens.loss(1e9) == pytest.approx(2.82, abs=0.02)
    assert KAPLAN.of_compute.loss(PETAFLOP_DAY) == pytest.approx(2.66, abs=0.02)
    # With all the text there is only the model counts, and the other way round.
    assert KAPLAN.loss(1e9, 1e20) == pytest.approx(KAPLAN.joint_parameters.loss(1e9), rel=1e-4)
    assert KAPLAN.loss(1e20, 1e9) == pytest.approx(KAPLAN.joint_tokens.loss(1e9), rel=1e-3)
    found = KAPLAN.optimum(PETAFLOP_DAY)
    assert found.parameters == pytest.approx(1.3e9)
    assert FLOPS_PER_PARAMETER * found.parameters * found.tokens == pytest.approx(PETAFLOP_DAY)


def test_what_is_read_again_counts_less_and_less():
    repeating, unique = REPEATING["muennighoff"], 1e10
    a, b = repeating.law.exponents
    assert a == b == 0.5
    small = 1e7  # fewer than are best for so much text: nothing of it is in excess
    assert repeating.loss(small, unique, unique) == pytest.approx(repeating.law.loss(small, unique))
    read = unique * np.asarray([1, 2, 4, 16, 1000])
    losses = repeating.loss(small, read, unique)
    assert (np.diff(losses) < 0).all()
    fresh = repeating.law.loss(small, read)
    assert (losses[1:] > fresh[1:]).all()
    # Four epochs are nearly as good as new text; a thousand come to an end.
    assert losses[2] - fresh[2] < 0.1 * (losses[0] - losses[2])
    end = repeating.law.loss(small, unique * (1 + repeating.of_tokens))
    assert losses[-1] == pytest.approx(end, rel=1e-6)
    # More parameters than the text is worth do not all count either.
    assert repeating.loss(1e12, unique, unique) > repeating.law.loss(1e12, unique)


def test_what_is_new_counts_whole():
    np.testing.assert_allclose(effective(np.asarray([1.0, 3.0]), 3.0, 5.0), [1.0, 3.0])
    assert effective(3.0 * (1 + 1e-6), 3.0, 5.0) == pytest.approx(3.0 * (1 + 1e-6), rel=1e-11)


def test_the_best_of_repeated_text_is_the_least_of_what_can_be_had():
    law, flops, unique = REPEATING["muennighoff"], 1e22, 1e10
    found = law.optimum(flops, unique)
    assert FLOPS_PER_PARAMETER * found.parameters * found.tokens == pytest.approx(flops)
    sizes = found.parameters * np.exp(np.linspace(-1, 1, 2001))
    tokens = flops / (FLOPS_PER_PARAMETER * sizes)
    losses = law.loss(sizes, tokens, np.minimum(unique, tokens))
    assert sizes[np.argmin(losses)] == pytest.approx(found.parameters, rel=2e-3)
    # With too little text it is better to read it again than to have more parameters (section 5).
    assert found.parameters < law.law.optimum(flops).parameters
    np.testing.assert_allclose(law.optimum(1e18, np.inf), law.law.optimum(1e18), rtol=1e-4)
