"""Products of bfloat16 numbers with float32 sums, and the second moments that are made of them."""

from __future__ import annotations

import pytest
import torch

from lowbit.solvers.products import bfloat16_products
from lowbit.solvers.stats import StatsBuilder


def settings() -> object:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return None if matmul is None else matmul.fp32_precision


def test_sums_of_bfloat16_numbers_are_float32_and_the_setting_comes_back() -> None:
    x = torch.randn(300, 128, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    before = settings()
    with pytest.raises(KeyError), bfloat16_products():
        found = x.T @ x
        raise KeyError
    assert settings() == before
    exact = x.double().T @ x.double()
    # A result rounded to bfloat16 would be off by 2^-9.
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("weighed", [False, True])
def test_moments_of_half_are_those_of_the_inputs_that_bfloat16_products_take(weighed: bool) -> None:
    """Also with a channel a thousand times the others, whose rounding would otherwise drown them."""
    g = torch.Generator().manual_seed(1)
    x, other = torch.randn(700, 300, generator=g), torch.randn(700, 300, generator=g) * 0.01
    x[:, 3] *= 1000
    weights = torch.rand(700, generator=g) + 0.5 if weighed else None
    builder = StatsBuilder(300, drift=True, half=True)
    for rows in (slice(0, 400), slice(400, 700)):
        builder.add(x[rows], (x + other)[rows], None if weights is None else weights[rows])
    stats = builder.stats()
    rounded = x.bfloat16().double()
    weighted = rounded if weights is None else rounded * weights.double()[:, None]
    exact = weighted.T @ rounded / 700
    scale = exact.diagonal().sqrt()
    assert ((stats.second_moment - exact) / (scale[:, None] * scale)).abs().max() < 1e-5
    assert torch.equal(stats.absmax, x.bfloat16().float().abs().amax(0))
    assert stats.drift is not None
    drift = ((x + other).double() - rounded).T @ weighted / 700
    assert (stats.drift - drift).norm() < 0.01 * drift.norm()
