"""Published methods: each formula by naive loops in float64, and golden numbers."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.formats import Grid, parse_format
from lowbit.kv import CacheFormat, Tables, round_trip
from lowbit.kv.named import about, published
from lowbit.solvers import Call
from lowbit.solvers.fits.norm import normal_scale

HEADS, TOKENS, WIDTH = 2, 96, 64


def keys(heads: int = HEADS, tokens: int = TOKENS, width: int = WIDTH) -> Tensor:
    x = torch.randn(heads, tokens, width, generator=torch.Generator().manual_seed(3))
    x[..., 5] *= 20
    x[..., 4] += 3
    return x


def half(value: float) -> float:
    return float(np.float16(value))


def apart(found: Tensor, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.double().numpy() - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_simquant_by_loops(bits: int) -> None:
    """LLMEasyQuant 3.5.4 and 3.5.5 for each channel of 64 tokens, with what is stored rounded to float16."""
    x = keys()
    wanted = np.zeros(x.shape)
    for h in range(HEADS):
        for start in range(0, TOKENS, 64):
            for c in range(WIDTH):
                block = x[h, start : start + 64, c].double().numpy()
                low, high = block.min(), block.max()
                inverse_s = half((high - low) / (2**bits - 1))
                z = half(-low / inverse_s)
                for t, value in enumerate(block):
                    code = min(max(math.floor(value / inverse_s + z + 0.5), 0), 2**bits - 1)
                    wanted[h, start + t, c] = (code - z) * inverse_s
    format = CacheFormat.of(f"simquant{bits}")
    assert format.keys == format.values
    found = round_trip(x, format.keys)
    differ = (found.double() - torch.from_numpy(wanted)).abs() > 1e-4
    # numbers half way between two levels, and blocks whose zero point is half way between two of float16
    assert float(differ.double().mean()) < 5e-3
    assert apart(found, wanted) < 1e-3


def test_simquant_golden() -> None:
    """One channel of four tokens at 2 bits: s = 3 / (2 - -1) = 1, z = 1, so that halves are what is lost."""
    x = torch.tensor([-1.0, 0.4, 0.6, 2.0]).view(1, 4, 1)
    assert round_trip(x, CacheFormat.of("simquant2").keys).flatten().tolist() == [-1.0, 0.0, 1.0, 2.0]


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_by_loops(bits: int) -> None:
    """Section 3.1: keys by channel over 32 tokens, values by token over 32 channels."""
    x = keys()
    by_channel, by_token = np.zeros(x.shape), np.zeros(x.shape)
    for h in range(HEADS):
        for start in range(0, TOKENS, 32):
            for c in range(WIDTH):
                by_channel[h, start : start + 32, c] = _kivi(x[h, start : start + 32, c], bits)
        for t in range(TOKENS):
            for c in range(0, WIDTH, 32):
                by_token[h, t, c : c + 32] = _kivi(x[h, t, c : c + 32], bits)
    format = CacheFormat.of(f"kivi{bits}")
    assert apart(round_trip(x, format.keys), by_channel) < 1e-3  # numbers half way between levels may go either way
    assert apart(round_trip(x, format.values), by_token) < 1e-3
    # what it is for: a channel that is large for every token costs the channels beside it by token, and by channel nothing
    beside = [c for c in range(32) if c != 5]
    lost = [float((round_trip(x, side) - x)[..., beside].norm()) for side in (format.keys, format.values)]
    assert lost[0] < 0.2 * lost[1]


def _kivi(block: Tensor, bits: int) -> list[float]:
    values = block.double().tolist()
    z, s = half(min(values)), half((max(values) - min(values)) / (2**bits - 1))
    return [min(max(round((v - z) / s), 0), 2**bits - 1) * s + z for v in values]


def test_kivi_keeps_the_newest() -> None:
    side = CacheFormat.of("kivi2").keys
    assert side.first_recent(127) == 0 and side.first_recent(300) == 173


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_turboquant_by_loops(bits: int) -> None:
    """Rotate by a Hadamard matrix built from its definition, and take the nearest of the levels for N(0, 1)."""
    x = keys()
    matrix = np.array([[(-1) ** bin(i & j).count("1") for j in range(WIDTH)] for i in range(WIDTH)]) / math.sqrt(WIDTH)
    levels = _lloyd_max(bits)
    wanted = np.zeros(x.shape)
    for h in range(HEADS):
        for t in range(TOKENS):
            y = x[h, t].double().numpy() @ matrix
            rms = math.sqrt(float((y**2).mean()))
            q = np.array([min(levels, key=lambda level: abs(value / rms - level)) for value in y])
            s = float(y @ q / (q @ q))
            q = np.array([min(levels, key=lambda level: abs(value / s - level)) for value in y])
            wanted[h, t] = s * q @ matrix.T
    found = round_trip(x, CacheFormat.of(f"turboquant{bits}").keys)
    # levels in whole numbers are off by up to half a unit, and the scale is float16
    assert apart(found, wanted) < 0.04
    error = float((found - x).square().sum() / x.square().sum())
    assert error < {1: 0.44, 2: 0.145, 3: 0.045, 4: 0.0135}[bits]


def _lloyd_max(bits: int) -> list[float]:
    """The levels of least error for N(0, 1), by Lloyd's iteration on the density."""
    normal = NormalDist()
    levels = [normal.inv_cdf((i + 0.5) / 2**bits) for i in range(2**bits)]
    for _ in range(3000):
        edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
        density = [0.0 if math.isinf(e) else normal.pdf(e) for e in edges]
        mass = [0.0 if e == -math.inf else 1.0 if e == math.inf else normal.cdf(e) for e in edges]
        levels = [(density[i] - density[i + 1]) / (mass[i + 1] - mass[i]) for i in range(len(levels))]
    return levels


@pytest.mark.parametrize("bits", range(1, 7))
def test_normal_grids_are_those_of_lloyd_and_max(bits: int) -> None:
    levels = parse_format(f"normal{bits}").grid.levels.double()
    best = torch.tensor(_lloyd_max(bits), dtype=torch.float64)
    assert torch.equal(levels, levels.round()) and float(levels.abs().max()) <= 127
    unit = float(levels @ best / (levels @ levels))
    assert float((levels * unit - best).abs().max()) < 0.55 * unit
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    grid = parse_format(f"normal{bits}").grid
    error = float((grid.round(z / unit) * unit - z).square().mean())
    assert (
        error < {1: 0.3634, 2: 0.11748, 3: 0.03455, 4: 0.009501, 5: 0.002505, 6: 0.000644}[bits] * 1.05
    )  # Max 1960, table 1


def test_norm_is_the_least_squares_of_its_levels() -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * 3
    for name in ("normal3", "normal4", "int4", "iq4nl"):
        fmt = parse_format(f"{name}:g64")
        scale = Call("norm")(x, fmt)
        start = x.square().mean(1).sqrt() * normal_scale(fmt.grid)
        q = fmt.grid.round(x / start[:, None])
        assert torch.allclose(scale, (x * q).sum(1) / (q * q).sum(1), rtol=1e-4)
        assert _normal_error(fmt.grid, normal_scale(fmt.grid)) < 1.0005 * min(
            _normal_error(fmt.grid, 0.002 * 1.01**i) for i in range(650)
        )
        error = (fmt.grid.round(x / scale[:, None]) * scale[:, None] - x).norm() / x.norm()
        best = Call("search", (("emphasis", 0.0),))(x, fmt)
        least = (fmt.grid.round(x / best[:, None]) * best[:, None] - x).norm() / x.norm()
        assert least <= error < 1.25 * least
    assert Call("norm")(torch.zeros(1, 64), parse_format("normal4:g64")).tolist() == [0.0]
    with pytest.raises(RecipeError, match="symmetric"):
        Call("norm")(x, parse_format("uint4:g64:min=fp16"))


def _normal_error(grid: Grid, s: float) -> float:
    """Of N(0, 1) with this scale."""
    z = torch.linspace(-5, 5, 4001)
    weight = torch.exp(-z.square() / 2)
    return float((weight * (grid.round(z / s) * s - z).square()).sum() / weight.sum())


def test_kvquant_by_loops() -> None:
    """What calibrated tables mean, number by number."""
    x = keys(1, 8, 6)
    levels = [-90, -40, -20, -3, 4, 25, 60, 120]
    scale, offset = torch.rand(1, 6) * 0.05 + 0.01, torch.randn(1, 6)
    format = CacheFormat.of("kvquant3")
    found = round_trip(x, format.keys, Tables(torch.tensor(levels).float(), scale, offset, torch.tensor([[5]])))
    for t in range(8):
        for c in range(6):
            s, o, value = float(scale[0, c]), float(offset[0, c]), float(x[0, t, c])
            wanted = half(value) if c == 5 else min(levels, key=lambda level: abs((value - o) / s - level)) * s + o
            assert float(found[0, t, c]) == pytest.approx(wanted, rel=1e-5)
    tables = Tables(torch.tensor(levels).float(), channels=torch.tensor([[5]]))
    found = round_trip(x, format.values, tables)
    for t in range(8):
        s = half(float(x[0, t, :5].abs().max()) / 127)
        for c in range(5):
            wanted = min(levels, key=lambda level: abs(float(x[0, t, c]) / s - level)) * s
            assert float(found[0, t, c]) == pytest.approx(wanted, rel=1e-5)


def test_every_method_names_its_source_and_its_bits() -> None:
    for name, method in published().items():
        words = about(name)
        assert "Source:" in words and "Bits" in words and len(words.splitlines()) < 40
        for bits in method.bits:
            keys_text, values_text = method.sides(bits)
            assert CacheFormat.of(f"{name}{bits}") == CacheFormat.of(f"k={keys_text},v={values_text}")
        assert CacheFormat.of(name) == CacheFormat.of(f"{name}{method.usual}")
        with pytest.raises(RecipeError, match=f"{name} has 1 to"):
            CacheFormat.of(f"{name}9")
