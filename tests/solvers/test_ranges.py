"""Range estimators against what the values themselves, all kept, would have said."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit.errors import FormatError, RecipeError, WeightError
from lowbit.formats import InputQuantizer, parse_format, parse_inputs
from lowbit.formats.inputs import round_inputs
from lowbit.solvers.ranges.entropy import Entropy, divergence
from lowbit.solvers.ranges.estimator import RangeMethod, estimators
from lowbit.solvers.ranges.histogram import Histogram
from lowbit.solvers.ranges.mse import Mse
from strategies import normal

SYMMETRIC, AFFINE = parse_format("int8:tensor"), parse_format("uint8:tensor:asym")
CLOSE = 2**-7  # the width of a bin


def batches(seed: int = 1) -> list[Tensor]:
    """Six batches whose spread differs by channel, one with a massive value."""
    found = [normal((32, 48), seed + i) * torch.linspace(0.1, 2, 48) + 0.3 for i in range(6)]
    found[3][5, 7] = 90.0
    return found


def after(name: str, fmt: str = "int8:tensor", **options: float) -> tuple[tuple[float, float], float]:
    """Range and clipped share after all batches."""
    one = RangeMethod(name, tuple(options.items())).start(parse_format(fmt))
    for x in batches():
        one.observe(x)
    return one.range(), one.clipped()


def near(a: float, b: float, limit: float) -> bool:
    return abs(a - b) <= limit * abs(b)


# Histogram.


@pytest.mark.parametrize("spread", [1e-30, 1e-3, 1.0, 1e30])
def test_counts_are_exact_in_whole_bins(spread: float) -> None:
    x = normal((4000,), 1) * spread
    seen = Histogram()
    for part in x.split(77):
        seen.add(part)
    lower, upper, counts = seen.bins()
    assert float(counts.sum()) == seen.total == 4000 and bool((counts > 0).all())
    assert (seen.low, seen.high) == (float(x.min()), float(x.max()))
    assert bool((upper[:-1] <= lower[1:]).all()) and float(lower[0]) == seen.low and float(upper[-1]) == seen.high
    for i in range(0, len(counts), 37):
        inside = (x.double() >= lower[i]) & (x.double() <= upper[i])
        assert int(inside.sum()) == int(counts[i])
    assert bool((upper - lower <= CLOSE * torch.maximum(lower.abs(), upper.abs()) + 1e-38).all())


def test_order_and_size_of_batches_do_not_matter() -> None:
    x, one, other = normal((5000,), 2), Histogram(), Histogram()
    one.add(x)
    for part in x.flip(0).split(13):
        other.add(part)
    other.add(torch.zeros(0))
    assert torch.equal(one.counts, other.counts) and (one.low, one.high) == (other.low, other.high)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.0, 0.5), (-9.0, 9.0), (3.0, 4.0), (-0.25, 0.0)])
def test_share_outside(low: float, high: float) -> None:
    x = torch.where(torch.arange(20_000) % 5 == 0, 0.0, normal((20_000,), 3))
    seen = Histogram()
    seen.add(x)
    true = float(((x < low) | (x > high)).double().mean())
    assert abs(seen.share_outside(low, high) - true) < 2e-3
    assert seen.share_outside(seen.low, seen.high) == 0 and Histogram().share_outside(0, 1) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_an_error(bad: float) -> None:
    x = torch.ones(8)
    x[3] = bad
    with pytest.raises(WeightError, match="NaN or infinite"):
        Histogram().add(x)


# Each estimator.


def test_minmax_is_the_range() -> None:
    x = torch.cat(batches())
    assert after("minmax", "uint8:tensor:asym") == ((float(x.min()), float(x.max())), 0.0)
    assert after("minmax") == ((-90.0, 90.0), 0.0)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_average_is_the_recurrence(momentum: float) -> None:
    low, high = 0.0, 0.0
    for i, x in enumerate(batches()):
        m = momentum if i else 0.0
        low, high = m * low + (1 - m) * float(x.min()), m * high + (1 - m) * float(x.max())
    found, clipped = after("average", "uint8:tensor:asym", momentum=momentum)
    assert found == pytest.approx((low, high), rel=1e-6)
    x = torch.cat(batches())
    assert clipped == pytest.approx(float(((x < low) | (x > high)).double().mean()), abs=2e-4)
    peak = max(-low, high)
    assert after("average", momentum=momentum)[0] == pytest.approx((-peak, peak), rel=1e-6)


@pytest.mark.parametrize("p", [50.0, 90.0, 99.0, 99.9, 99.99, 100.0])
def test_percentile_is_an_order_statistic(p: float) -> None:
    x = torch.cat(batches()).double().flatten()
    (low, high), clipped = after("percentile", p=p)
    ordered = x.abs().sort().values
    k = math.ceil(p / 100 * len(x)) - 1
    # Between bins and between neighbours of so sparse a tail lies what is near.
    assert ordered[max(0, k - 1)] * (1 - CLOSE) <= high <= ordered[min(len(x) - 1, k + 1)] * (1 + CLOSE)
    assert low == -high and clipped == pytest.approx(1 - p / 100, abs=1e-3)
    ordered, tail = x.sort().values, (100 - p) / 200
    (low, high), _ = after("percentile", "uint8:tensor:asym", p=p)
    for found, share in ((low, tail), (high, 1 - tail)):
        k = min(len(x) - 1, max(0, math.ceil(share * len(x)) - 1))
        around = ordered[max(0, k - 1)], ordered[min(len(x) - 1, k + 1)]
        assert around[0] - CLOSE * abs(around[0]) <= found <= around[1] + CLOSE * abs(around[1])


@pytest.mark.parametrize(
    "fmt", ["int8:tensor", "uint8:tensor:asym", "int4:tensor", "uint4:tensor:zero=fp32", "fp8:tensor"]
)
def test_mse_is_the_best_of_its_candidates_on_the_values_themselves(fmt: str) -> None:
    x = torch.cat(batches())

    def cost(low: float, high: float) -> float:
        value = parse_inputs(f"{fmt}:static")
        one.range = lambda: (low, high)  # type: ignore[method-assign]
        quantizer = InputQuantizer.of(value, 48, one.input_parts(value))
        return float((quantizer.round(x).double() - x).square().sum())

    one = Mse(parse_format(fmt))
    for part in batches():
        one.observe(part)
    low, high = one.range()
    predicted, bins = one.error(one.histogram.bins(), low, high), one.histogram.bins()
    limit = 0.02 if one.format.grid.bits == 8 else 0.01
    assert near(predicted, cost(low, high), limit)
    for factor in (1.0, 0.5, 0.1, 0.05):
        full = one.histogram.low * factor, one.histogram.high * factor
        if one.symmetric:
            full = -max(-full[0], full[1]), max(-full[0], full[1])
        assert near(one.error(bins, *full), cost(*full), limit)
        assert cost(low, high) <= cost(*full) * (1 + limit)
    if one.format.grid.bits == 4:
        assert cost(low, high) < 0.75 * cost(
            one.histogram.low if not one.symmetric else -one.histogram.high, one.histogram.high
        )


def test_the_error_of_mse_is_an_exact_integral() -> None:
    """Evenly spread values: rounding costs s^2 / 12 each, clipping (x - c)^2."""
    x = torch.linspace(-1, 1, 200_001)
    one = Mse(parse_format("int4:tensor"))
    one.observe(x)
    for peak in (1.0, 0.6):
        s = peak / 7
        rounded = (x.double() / s).round().clamp(-8, 7) * s
        true = float((rounded - x).square().sum())
        assert near(one.error(one.histogram.bins(), -peak, peak), true, 2e-3)


def test_constants_have_a_range() -> None:
    for value in (0.0, 2.5, -3.0):
        for name in estimators():
            for fmt in ("int8:tensor:static", "uint8:tensor:asym:static"):
                given = parse_inputs(fmt)
                one = RangeMethod(name).start(given.format)  # type: ignore[arg-type]
                one.observe(torch.full((4, 16), value))
                quantizer = InputQuantizer.of(given, 16, one.input_parts(given))
                x = torch.full((2, 16), value)
                assert torch.allclose(quantizer.round(x), x, rtol=0.02), (name, fmt, value)


def naive_divergence(counts: list[float], i: int, levels: int) -> float:
    """As Migacz 2017 writes it, in loops."""
    p = counts[:i]
    q = [0.0] * i
    for level in range(levels):
        inside = [k for k in range(i) if k * levels // i == level]
        filled = [k for k in inside if counts[k] > 0]
        for k in filled:
            q[k] = sum(counts[j] for j in inside) / len(filled)
    p[-1] += sum(counts[i:])
    total_p, total_q = sum(p), sum(q)
    if any(a > 0 and b == 0 for a, b in zip(p, q)):
        return math.inf
    return sum(a / total_p * math.log((a / total_p) / (b / total_q)) for a, b in zip(p, q) if a > 0)


def test_the_divergence_of_entropy_is_the_loop() -> None:
    counts = (normal((200,), 4).abs() * 40).round().double()
    for i in range(16, 201, 9):
        expected, found = naive_divergence(counts.tolist(), i, 16), divergence(counts, i, 16)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_entropy_counts_magnitudes_in_equal_bins_and_takes_the_least() -> None:
    one = Entropy(SYMMETRIC, bins=512)
    x = torch.cat(batches())[:, :40]
    one.observe(x)
    peak = float(x.abs().max())
    true = torch.histc(x.abs(), 512, 0, peak).double()
    found = one.linear(peak)
    assert float(found.sum()) == pytest.approx(x.numel()) and bool((found >= -1e-9).all())
    moved = (found.cumsum(0) - true.cumsum(0)).abs().max() / x.numel()
    assert float(moved) < 0.01
    low, high = one.range()
    i = round(high / peak * 512)
    assert low == -high and i == min(range(128, 513), key=lambda k: divergence(found, k, 128))


def test_entropy_and_mse_give_up_a_lone_outlier() -> None:
    for name, fmt in (("entropy", "int8:tensor"), ("mse", "int4:tensor"), ("average", "int8:tensor")):
        (_, high), clipped = after(name, fmt)
        assert 3 < high < 45 and 0 < clipped < 2e-2, name


def test_positive_values_have_a_range_that_begins_at_zero_or_above() -> None:
    x = normal((64, 48), 5).relu()
    for name in estimators():
        one = RangeMethod(name).start(AFFINE)
        one.observe(x)
        low, high = one.range()
        assert 0 <= low < high


# What is stored.


def test_parts_are_what_static_inputs_store() -> None:
    for text in ("int8:tensor:static", "uint8:tensor:asym:static", "fp8:tensor:static"):
        given = parse_inputs(text)
        one = RangeMethod("minmax").start(given.format)  # type: ignore[arg-type]
        x = torch.cat(batches())
        one.observe(x)
        parts = one.input_parts(given)
        assert InputQuantizer.of(given, 48, parts).scale is not None
        dynamic = round_inputs(x, parse_inputs(text.removesuffix(":static")))
        assert torch.equal(InputQuantizer.of(given, 48, parts).round(x), dynamic)
    with pytest.raises(FormatError, match="int8:tensor:static"):
        one.input_parts(parse_inputs("int8:token"))


def test_nothing_observed_is_an_error() -> None:
    for name in estimators():
        one = RangeMethod(name).start(SYMMETRIC)
        one.observe(torch.zeros(0, 4))
        with pytest.raises(FormatError, match="no inputs were observed"):
            one.range()


# Names and options.


def test_they_are_found_by_walking_the_package() -> None:
    assert list(estimators()) == ["average", "entropy", "minmax", "mse", "percentile"]
    assert all((kind.__doc__ or "").strip() for kind in estimators().values())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("minmx", (), "did you mean 'minmax'"),
        ("minmax", (("p", 1),), "it has none"),
        ("percentile", (("q", 99.0),), "it has p"),
        ("percentile", (("p", 0),), "outside 0 < p"),
        ("percentile", (("p", 101.0),), "outside 0 < p"),
        ("percentile", (("p", 99.0), ("p", 98.0)), "given twice"),
        ("percentile", (("p", True),), "is a number"),
        ("average", (("momentum", 1.0),), "momentum"),
        ("mse", (("steps", 0),), "whole numbers"),
        ("entropy", (("bins", 100),), "whole number from 256"),
    ],
)
def test_wrong_names_and_options_are_errors(name: str, options: tuple[tuple[str, float], ...], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        RangeMethod(name, options).start(SYMMETRIC)


def test_how_a_method_is_written() -> None:
    assert str(RangeMethod("percentile", (("p", 99.9),))) == "percentile(p=99.9)" and str(RangeMethod()) == "minmax"
    assert RangeMethod("mse", (("steps", 8), ("octaves", 3))) == RangeMethod("mse", (("octaves", 3), ("steps", 8)))
