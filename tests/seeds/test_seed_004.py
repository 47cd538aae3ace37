"""Seed 004, "LLMEasyQuant": symmetric, zero-exact and per-channel min-max quantization by its formulas.

Where a formula of the paper is ambiguous or wrong, the test says so and lowbit does what its source does.
"""

from __future__ import annotations

import pytest
import torch
from seed_words import levels, quantize

from strategies import normal

SEEDS = range(4)


def away_from_ties(exact: torch.Tensor) -> torch.Tensor:
    """Where rounding does not depend on the last bits: x.5 goes to the even integer here and up in the paper."""
    return (exact - exact.floor() - 0.5).abs() > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_symmetric(seed):
    """3.2.2: Q = clamp(round(x / s), -128, 127), s = max|X| / 127.5."""
    x = normal((8, 64), seed)
    q, s = quantize(x, "symmetric"), x.double().abs().max() / 127.5
    exact = x.double() / s
    keep = away_from_ties(exact)
    torch.testing.assert_close(q.scales().double().squeeze(), s, rtol=1e-6, atol=0)
    assert torch.equal(levels(q)[keep], exact.round().clamp(-128, 127).int()[keep])
    assert float((q.dequantize() - x).abs().max()) <= float(s) / 2 * 1.0001


@pytest.mark.parametrize("peak", [0.7, 1.0, 3.3])
def test_symmetric_needs_its_clamp_above_only(peak):
    """x / s is 127.5 at the peak: above, 128 is clamped; below, -127 and -128 are as near."""
    assert levels(quantize(torch.tensor([[peak, 0.0, 0.3]]), "symmetric"))[0, 0] == 127
    assert levels(quantize(torch.tensor([[-peak, 0.0, 0.3]]), "symmetric"))[0, 0] in (-127, -128)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_general_formula_of_the_introduction(seed):
    """1: Q = clamp(floor((x - min) / D + 0.5) + z, -128, 127), D = (max - min) / 255, z = -128: min-max on int8."""
    x = normal((8, 64), seed) + 0.3
    w = x.double()
    step = (w.max() - w.min()) / 255
    exact = (w - w.min()) / step
    expected = ((exact + 0.5).floor() - 128).clamp(-128, 127).int()
    keep = away_from_ties(exact)
    assert torch.equal(levels(quantize(x, "minmax"))[keep], expected[keep])


@pytest.mark.parametrize("seed", SEEDS)
def test_simquant(seed):
    """3.5.4: s = (2^bits - 1) / (max - min) and z = -min s per channel, clamp(floor(X s + z + 0.5), 0, 2^bits - 1).

    3.5.2 adds a Z "to center the range" to an expression that has the minimum subtracted already; the steps of
    3.5.4, which are those of KVQuant, have no such Z. A channel is an output channel, a row of the weight.
    """
    x = normal((16, 100), seed) * torch.logspace(-1, 1, 16)[:, None]
    w = x.double()
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    s = 255 / (high - low)
    z = -low * s
    exact = w * s + z
    expected = (exact + 0.5).floor().clamp(0, 255)
    q, keep = quantize(x, "simquant"), away_from_ties(exact)
    torch.testing.assert_close(1 / q.scales()[0].double(), s, rtol=1e-5, atol=0)
    torch.testing.assert_close(q.offsets()[0].double(), z, rtol=1e-5, atol=1e-4)
    assert torch.equal(levels(q)[keep], expected.int()[keep])
    torch.testing.assert_close(q.dequantize().double()[keep], ((expected - z) / s)[keep], rtol=1e-4, atol=1e-5)
    assert levels(q).amin(1).tolist() == [0] * 16 and levels(q).amax(1).tolist() == [255] * 16


@pytest.mark.parametrize("seed", SEEDS)
def test_zeroquant_represents_zero_exactly(seed):
    """3.1: "zero values are represented exactly". Groups of 128, a rounded zero-point within the grid, error <= s."""
    x = normal((8, 300), seed)
    x[:, ::7] = 0
    q = quantize(x, "zeroquant")
    assert tuple(q.scales().shape) == (1, 8, 3)
    assert bool((q.dequantize()[:, ::7] == 0).all())
    offsets = q.offsets()
    assert bool((offsets == offsets.round()).all()) and bool(((offsets >= -128) & (offsets <= 127)).all())
    for group in range(3):
        columns = slice(128 * group, min(128 * (group + 1), 300))
        w = x[:, columns].double()
        low, high = w.amin(1).clamp_max(0), w.amax(1).clamp_min(0)
        s = q.scales()[0, :, group].double()
        torch.testing.assert_close(s, (high - low) / 255, rtol=2e-3, atol=0)  # kept in float16
        assert bool(((q.dequantize()[:, columns].double() - w).abs() <= 1.001 * s[:, None]).all())


def test_the_zeroquant_formula_as_printed_loses_half_of_the_range():
    """3.1.2: clamp(floor((x - min) / D + z), -128, 127) with "z adjusted so that min maps to 0", that is z = 0.

    The values then run from 0 to 255 and all above 127 are clamped; zero is not exact; and floor without the
    0.5 of the introduction errs by a whole step. ZeroQuant (Yao et al. 2022) rounds, and picks the zero-point so
    that zero is exact: so do we.
    """
    x = torch.rand((1, 128), generator=torch.Generator().manual_seed(9)) - 0.4
    w = x.double()
    step = (w.max() - w.min()) / 255
    as_printed = ((w - w.min()) / step).floor().clamp(-128, 127) * step + w.min()
    assert int(((w - w.min()) / step > 128).sum()) > 50
    ours = quantize(x, "zeroquant").dequantize().double()
    assert float((ours - w).norm()) < 0.02 * float((as_printed - w).norm())


def test_absmax_and_zeropoint_of_section_2_are_those_of_seed_000():
    x = normal((4, 32), 10)
    assert 1 / float(quantize(x, "absmax").scales()) == pytest.approx(127 / float(x.abs().max()))
    q = quantize(x, "zeropoint")
    assert float(q.offsets()) == float(q.offsets().round()) and bool((q.dequantize()[x == 0] == 0).all())
