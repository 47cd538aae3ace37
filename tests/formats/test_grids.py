"""A code is the nearest level: brute force over all levels in float64 is the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import CodebookGrid, Fp8Grid, Grid, IntGrid, TableGrid, parse_grid
from lowbit.formats.nearest import nearest_level
from strategies import FIXED_GRIDS, steady

ALL = [parse_grid(name) for name in FIXED_GRIDS] + [IntGrid(bits, narrow=True) for bits in range(2, 9)]


def hard_values(levels: Tensor, seed: int) -> Tensor:
    """float32 values inside the axis: levels, midpoints, both neighbours of each, and random ones."""
    levels = levels[levels.isfinite()].unique()
    middle = ((levels[1:].double() + levels[:-1].double()) / 2).float()
    exact = torch.cat([levels, middle])
    near = [torch.nextafter(exact, torch.full_like(exact, end)) for end in (-math.inf, math.inf)]
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(500, generator=generator)
    inside = levels.min() + share * (levels.max() - levels.min())
    x = torch.cat([exact, *near, inside]).clamp(levels.min(), levels.max())
    return x[(x == 0) | (x.abs() > 1e-30)]  # float64 cannot tell 1 - 1e-45 from 1: the oracle would see a tie


def check_nearest(x: Tensor, codes: Tensor, levels: Tensor, tie_goes_to: str) -> None:
    """The level of each code is as near as any other, and exact ties go where the grid says."""
    assert codes.dtype == torch.uint8
    distance = (x.double()[:, None] - levels.double()).abs().nan_to_num(nan=math.inf)
    least = distance.amin(1)
    chosen = distance.gather(1, codes.long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, least, rtol=0, atol=0)
    for row in ((distance == least[:, None]).sum(1) > 1).nonzero()[:, 0].tolist():
        near = (distance[row] == least[row]).nonzero()[:, 0]
        if len(levels[near].unique()) == 1:  # the same level twice: the lowest code
            assert codes[row] == near.min() or levels[codes[row].long()] == 0
            continue
        code, value = int(codes[row]), float(levels[codes[row].long()])
        if tie_goes_to == "even level":
            assert value % 2 == 0
        elif tie_goes_to == "lower level":
            assert value == float(levels[near].min())
        elif len({int(c) % 2 for c in near}) == 2:
            assert code % 2 == 0


def rule(grid: Grid) -> str:
    return "even level" if isinstance(grid, IntGrid) else "even code"


@pytest.mark.parametrize("grid", ALL, ids=lambda g: f"{g}{'-narrow' if getattr(g, 'narrow', False) else ''}")
def test_every_grid_encodes_to_the_nearest_level(grid):
    x = hard_values(grid.levels, seed=1)
    codes = grid.encode(x)
    check_nearest(x, codes, grid.levels, rule(grid))
    torch.testing.assert_close(grid.decode(codes), grid.levels[codes.long()], rtol=0, atol=0)
    torch.testing.assert_close(grid.round(x), grid.decode(codes), rtol=0, atol=0)


@pytest.mark.parametrize("grid", ALL, ids=str)
def test_values_off_the_axis_saturate(grid):
    far = torch.tensor([grid.hi * 1.5 + 1, 1e30, 3e38])
    assert grid.decode(grid.encode(far)).tolist() == [grid.hi] * 3
    assert grid.decode(grid.encode(-far - abs(grid.lo))).tolist() == [grid.lo] * 3


@pytest.mark.parametrize("grid", ALL, ids=str)
def test_levels_are_their_own_codes(grid):
    levels = grid.levels
    real = levels.isfinite()
    assert len(levels) == grid.cardinality <= 1 << grid.bits
    assert levels[real].min() == grid.lo and levels[real].max() == grid.hi
    codes = grid.encode(levels[real])
    torch.testing.assert_close(grid.decode(codes), levels[real], rtol=0, atol=0)
    twice = levels[real] == 0  # +0 and -0 are one level
    assert torch.equal(codes[~twice].long(), real.nonzero()[:, 0][~twice])


@st.composite
def tables(draw) -> TableGrid:
    """Random tables, some with levels a few units in the last place apart, some far from zero."""
    count, seed = draw(st.integers(2, 256)), draw(st.integers(0, 10**6))
    kind = draw(st.sampled_from(["spread", "geometric", "adjacent", "far", "mixed"]))
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(count, generator=generator)
    if kind == "spread":
        levels = u * 2 - 1
    elif kind == "geometric":
        levels = (10 ** (u * 12 - 8)) * torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    elif kind == "adjacent":  # consecutive float32 values
        levels = (torch.tensor(1.5).view(torch.int32) + torch.arange(count, dtype=torch.int32)).view(torch.float32)
    elif kind == "far":
        levels = 5e7 + torch.arange(count) * 8.0
    else:
        levels = torch.cat([u[: count // 2], 1 + u[count // 2 :] * 1e-6])
    if draw(st.booleans()):
        levels = -levels
    levels = levels.unique()
    levels = levels[torch.randperm(len(levels), generator=generator)]
    return TableGrid("random", tuple(levels.tolist()) if len(levels) > 1 else (0.0, 1.0))


@steady(120)
@given(tables(), st.integers(0, 10**6))
def test_random_tables_encode_to_the_nearest_level(grid, seed):
    x = hard_values(grid.levels, seed)
    codes = grid.encode(x)
    check_nearest(x, codes, grid.levels, "even code")
    torch.testing.assert_close(grid.round(x), grid.decode(codes), rtol=0, atol=0)


@steady(80)
@given(tables(), st.integers(1, 4), st.integers(0, 10**6))
def test_learned_levels_encode_to_the_nearest_and_ties_go_down(grid, rows, seed):
    levels = grid.levels.sort().values
    scale = torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed)) + 0.5
    own = (levels * scale).sort(1).values
    x = torch.stack([hard_values(row, seed)[: 3 * len(levels)] for row in own])
    codes = nearest_level(x, own)
    for row in range(rows):
        kept = own[row].clone()
        check_nearest(x[row], codes[row], kept, "lower level")


def test_a_table_with_one_distinct_level_has_one_answer():
    grid = TableGrid("flat", (2.0, 2.0, 2.0))
    assert grid.encode(torch.tensor([-1.0, 2.0, 9.0])).tolist() == [0, 0, 0]


def test_published_levels():
    assert parse_grid("e2m1").levels[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert parse_grid("e4m3").decode(torch.tensor([0x7E, 0x08, 0x01], dtype=torch.uint8)).tolist() == [
        448,
        2**-6,
        2**-9,
    ]
    assert parse_grid("e5m2").decode(torch.tensor([0x7B, 0x04, 0x01], dtype=torch.uint8)).tolist() == [
        57344,
        2**-14,
        2**-16,
    ]
    nf4 = parse_grid("nf4").levels
    assert nf4[0] == -1 and nf4[7] == 0 and nf4[15] == 1 and len(nf4.unique()) == 16
    assert torch.equal(parse_grid("fp4").levels, parse_grid("e2m1").levels)


def test_nf4_levels_are_the_quantiles_of_its_paper():
    """QLoRA, equation 4, with the offset that its code uses: 8 + 9 quantiles of N(0, 1) that share the zero."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    quantile = torch.distributions.Normal(0.0, 1.0).icdf
    up = quantile(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    down = -quantile(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    levels = torch.cat([up, down, torch.zeros(1, dtype=torch.float64)]).sort().values
    torch.testing.assert_close(parse_grid("nf4").levels.double(), levels / levels.max(), atol=2e-6, rtol=0)


def test_shapes_are_kept():
    for name in ("int4", "e4m3", "nf4", "ternary"):
        grid = parse_grid(name)
        for shape in ((), (0,), (3, 0), (2, 3, 4)):
            codes = grid.encode(torch.zeros(shape))
            assert (
                codes.shape == shape
                and grid.decode(codes).shape == shape
                and grid.round(torch.zeros(shape)).shape == shape
            )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: IntGrid(9), "1 to 8 bits"),
        (lambda: IntGrid(1, narrow=True), "narrow"),
        (lambda: IntGrid(4, is_signed=False, narrow=True), "narrow"),
        (lambda: Fp8Grid(4), "mantissa"),
        (lambda: CodebookGrid(0), "1 to 8 bits"),
        (lambda: TableGrid("t", (1.0,)), "2 to 256"),
        (lambda: TableGrid("t", (1.0, math.inf)), "finite"),
        (lambda: TableGrid("t", tuple(map(float, range(257)))), "2 to 256"),
        (lambda: parse_grid("int12"), "unknown grid"),
        (lambda: parse_grid("int²"), "unknown grid"),
        (lambda: parse_grid("nf5"), "nf4"),
        (lambda: parse_grid("nf4", narrow=True), "narrow"),
        (lambda: parse_grid("kmeans4").levels, "learned"),
    ],
)
def test_impossible_grids_are_errors(make, words):
    with pytest.raises(FormatError, match=words):
        make()
