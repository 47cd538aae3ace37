"""Fits with a formula, against the formula in float64, and the error bounds of their docstrings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.formats import Format, QTensor, parse_format
from lowbit.solvers import Call
from strategies import FIXED_GRIDS, normal, steady

SIGNED = [name for name in FIXED_GRIDS if not name.startswith("uint") and name != "int1"]
INTEGER = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (2, 3, 4, 5, 6, 8)]
KINDS = ["asym", "zero=int32", "zero=fp32", "min=fp32"]
SEEDS = st.integers(0, 10**6)


def fitted(fit: str, x: Tensor, fmt: Format, **options: float) -> tuple[Tensor, Tensor | None]:
    """What the bare fit says of each row of `x`, before anything is stored."""
    found = Call(fit, tuple(options.items()))(x, fmt, None)
    return found if isinstance(found, tuple) else (found, None)


def quantized(fit: str, x: Tensor, fmt: Format, **options: float) -> QTensor:
    return Call("rtn")(x, fmt, Call(fit, tuple(options.items())), None)


def half_gap(fmt: Format) -> float:
    levels = fmt.grid.levels[fmt.grid.levels.isfinite()].double().sort().values
    return float(levels.diff().max()) / 2


def within(q: QTensor, x: Tensor, steps: float) -> bool:
    """Every error at most `steps` of its block's scale (one block a row), float32 rounding aside."""
    bound = steps * q.scales()[0].double() + 2e-6 * x.abs().amax(1, keepdim=True)
    return bool(((q.dequantize().double() - x.double()).abs() <= bound).all())


@pytest.mark.parametrize("grid", SIGNED)
@steady(10)
@given(SEEDS)
def test_absmax(grid, seed):
    x, fmt = normal((5, 24), seed), parse_format(f"{grid}:channel")
    scale, offset = fitted("absmax", x, fmt)
    assert offset is None
    torch.testing.assert_close(scale.double(), x.double().abs().amax(1) / fmt.grid.hi, rtol=2e-7, atol=0)
    q = quantized("absmax", x, fmt)
    assert within(q, x, half_gap(fmt))
    if bool((fmt.grid.levels == 0).any()):
        assert bool((q.dequantize()[x == 0] == 0).all())


@pytest.mark.parametrize("grid", [g for g in SIGNED if g not in ("e4m3", "e5m2")])
@steady(10)
@given(SEEDS)
def test_symmetric(grid, seed):
    x, fmt = normal((5, 24), seed), parse_format(f"{grid}:channel")
    x[0, 0], x[1, 0] = x[0].abs().max() + 1, -x[1].abs().max() - 1
    scale, _ = fitted("symmetric", x, fmt)
    expected = 2 * x.double().abs().amax(1) / (fmt.grid.hi - fmt.grid.lo)
    torch.testing.assert_close(scale.double(), expected, rtol=3e-7, atol=0)
    assert within(quantized("symmetric", x, fmt), x, half_gap(fmt))


@pytest.mark.parametrize("grid", INTEGER)
@pytest.mark.parametrize("kind", KINDS)
@steady(10)
@given(SEEDS, st.floats(-4, 4))
def test_minmax(grid, kind, seed, shift):
    x, fmt = normal((5, 24), seed) + shift, parse_format(f"{grid}:channel:{kind}")
    scale, offset = fitted("minmax", x, fmt)
    low, high = x.double().amin(1), x.double().amax(1)
    if kind == "asym":
        low, high = low.clamp_max(0), high.clamp_min(0)
    steps = fmt.grid.hi - fmt.grid.lo
    torch.testing.assert_close(scale.double(), (high - low) / steps, rtol=1e-6, atol=0)
    torch.testing.assert_close(offset.double(), fmt.grid.lo - low * steps / (high - low), rtol=1e-5, atol=1e-5)
    q = quantized("minmax", x, fmt)
    rounds = kind in ("asym", "zero=int32")
    assert within(q, x, 1.0 if rounds else 0.5)
    if kind == "asym":  # zero lies on the grid, so it is exact
        zero = normal((5, 24), seed + 1)
        zero[:, 3] = 0
        assert bool((quantized("minmax", zero, fmt).dequantize()[:, 3] == 0).all())


def test_minmax_uses_the_whole_axis():
    x = normal((8, 40), 2)
    for kind in ("zero=fp32", "min=fp32"):
        codes = quantized("minmax", x, parse_format(f"uint4:channel:{kind}")).unpacked()
        assert codes.gather(1, x.argmin(1, keepdim=True)).tolist() == [[0]] * 8
        assert codes.gather(1, x.argmax(1, keepdim=True)).tolist() == [[15]] * 8


@pytest.mark.parametrize("store", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["zero=fp32", "min=fp32"])
def test_minmax_sees_the_scale_that_is_stored(kind, store):
    """Blocks far from zero: rounding the scale would move the whole block if the offset did not know of it."""
    x = normal((64, 32), 0, spread=0.05) + 1
    fmt = parse_format(f"uint4:g32:{kind}:s={store}")
    # The stored scale may be short by 2^-8 of itself, 15 steps of it: the highest value clips by 15 / 256.
    assert within(quantized("minmax", x, fmt), x, 0.5 + 15 * 2.0**-8)


@pytest.mark.parametrize("grid", ["e2m1", "e4m3", "int4", "int8", "e5m2"])
@steady(20)
@given(SEEDS, st.integers(-100, 90))
def test_mx(grid, seed, power):
    x, fmt = normal((5, 32), seed) * 2.0**power, parse_format(f"{grid}:g32:s=e8m0")
    peak = x.double().abs().amax(1)
    assume(bool((peak > 2.0**-110).all()))
    scale, _ = fitted("mx", x, fmt)
    expected = [2.0 ** (math.floor(math.log2(p)) - math.floor(math.log2(fmt.grid.hi))) for p in peak.tolist()]
    assert scale.tolist() == expected
    q = quantized("mx", x, fmt)
    assert q.scales()[0, :, 0].tolist() == expected
    inside = x.abs() <= fmt.grid.hi * scale[:, None]
    error = (q.dequantize().double() - x.double()).abs()
    assert bool((error <= half_gap(fmt) * scale.double()[:, None] + 1e-6 * x.abs())[inside].all())
    top = 2.0 ** (math.floor(math.log2(fmt.grid.hi)) + 1)
    assert bool((x.abs() <= top * scale[:, None]).all())


@pytest.mark.parametrize("grid", ["ternary", "binary"])
@steady(15)
@given(SEEDS, st.sampled_from([1, 2, 7, 32, 5000]))
def test_absmean(grid, seed, n):
    x = normal((3, n), seed)
    q = quantized("absmean", x, parse_format(f"{grid}:channel"))
    mean = x.double().abs().mean(1)
    assert q.scales()[0, :, 0].tolist() == pytest.approx(mean.tolist(), rel=1e-5)
    if grid == "binary":  # no other scale has a smaller squared error
        for factor in (0.9, 1.1):
            other = q.dequantize().sign() * (mean * factor)[:, None]
            assert float((other - x).square().sum()) >= float((q.dequantize().double() - x).square().sum()) * (1 - 1e-6)


def nearest_rank(values: list[float], share: float) -> float:
    return sorted(values)[max(1, math.ceil(share * len(values) - 1e-9)) - 1]


@pytest.mark.parametrize("p", [50.0, 90.0, 99.0, 100.0])
@steady(15)
@given(SEEDS, st.sampled_from([1, 2, 7, 32, 100]))
def test_percentile(p, seed, n):
    x = normal((3, n), seed) + 0.1
    scale, _ = fitted("percentile", x, parse_format("int4:channel"), p=p)
    expected = [nearest_rank([abs(v) for v in row], p / 100) / 7 for row in x.tolist()]
    assert scale.tolist() == pytest.approx(expected, rel=1e-6)
    fmt = parse_format("uint4:channel:zero=fp32")
    scale, offset = fitted("percentile", x, fmt, p=p)
    inner = 1 - (100 - p) / 200
    for row, s, z in zip(x.tolist(), scale.tolist(), offset.tolist(), strict=True):
        low, high = -nearest_rank([-v for v in row], inner), nearest_rank(row, inner)
        if high > low:
            assert s == pytest.approx((high - low) / 15, rel=1e-5)
            assert z == pytest.approx(-low / s, rel=1e-4, abs=1e-4)


def test_percentile_of_100_is_absmax_and_minmax():
    x = normal((6, 50), 9)
    for text, other in (("int4:channel", "absmax"), ("uint4:channel:asym", "minmax")):
        fmt = parse_format(text)
        a, b = quantized("percentile", x, fmt, p=100), quantized(other, x, fmt)
        assert torch.equal(a.dequantize(), b.dequantize())


def test_percentile_ignores_an_outlier():
    x = normal((1, 2000), 1).clamp(-2, 2)
    x[0, 5] = 1000
    q = quantized("percentile", x, parse_format("int8:tensor"), p=99.9)
    keep = torch.arange(2000) != 5
    assert float((q.dequantize() - x)[0, keep].abs().max()) <= 2 / 127 / 2 * 1.0001


@pytest.mark.parametrize("p", [0.0, -1.0, 100.5])
def test_impossible_percentiles_are_errors(p):
    with pytest.raises(RecipeError, match="outside|not negative"):
        fitted("percentile", torch.ones(1, 4), parse_format("int8"), p=p)


@pytest.mark.parametrize("fit", ["absmax", "symmetric", "mx"])
def test_a_symmetric_fit_cannot_fill_an_offset(fit):
    with pytest.raises(RecipeError, match="cannot fill the offset"):
        quantized(fit, torch.ones(2, 4), parse_format("int8:asym"))


@pytest.mark.parametrize("fit", ["minmax", "hqq"])
def test_an_affine_fit_needs_an_offset(fit):
    with pytest.raises(RecipeError, match="needs an offset"):
        quantized(fit, torch.ones(2, 4), parse_format("int8"))
