"""The cost of rounding from a sample of rows: against all rows, and the sampling by its own arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.budget import rounding_cost
from lowbit.budget.rounding_cost import rounding_costs, sampled_rows
from lowbit.errors import WeightError
from lowbit.formats import parse_format
from lowbit.interchange.tensors import Kind, TensorPlan

FORMATS = [parse_format(text) for text in ("int3:g32", "iq4nl:g32", "int4:g64:asym", "int6:channel", "int4:tensor")]


def heavy(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and a Fisher information of which a few rows and columns have most."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.randn((*shape[:-1], 1), generator=generator).exp()
    rows = (2 * torch.randn((*shape[:-1], 1), generator=generator)).exp()
    columns = torch.randn((*shape[:-2], 1, shape[-1]), generator=generator).exp()
    return weight, rows * columns * torch.rand(shape, generator=generator)


def plan_of(shape: tuple[int, ...], kind: Kind = "linear") -> TensorPlan:
    return TensorPlan("w", shape, kind, torch.float32, False, None, None)


@pytest.mark.parametrize("seed", range(5))
def test_a_row_stands_for_one_over_its_probability(seed: int) -> None:
    size = (2 * torch.randn(5000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).exp()
    rows = sampled_rows(size, 200)
    assert abs(len(rows.index) - 200) <= 1 and bool((rows.index[1:] > rows.index[:-1]).all())
    assert float(rows.times.min()) == 1, "the largest are in it for themselves alone"
    assert set(size.topk(10).indices.tolist()) <= set(rows.index.tolist())
    assert float((rows.times * size[rows.index]).sum()) == pytest.approx(float(size.sum()), rel=0.01)
    assert float(rows.times.sum()) == pytest.approx(5000, rel=0.5)
    again = sampled_rows(size, 200)
    assert torch.equal(rows.index, again.index) and torch.equal(rows.times, again.times)


def test_one_row_that_has_everything_is_taken() -> None:
    size = torch.zeros(100, dtype=torch.float64)
    size[37] = 1
    rows = sampled_rows(size, 10)
    assert rows.index.tolist() == [37] and rows.times.tolist() == [1]


@pytest.mark.parametrize("shape", [(2048, 96), (6, 400, 64)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_sample_tells_what_all_rows_cost(
    shape: tuple[int, ...], turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, fisher = heavy(shape)
    if turned:  # a view, as of a weight that is stored the other way
        weight, fisher = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (weight, fisher))
    plan = plan_of(shape, "linear" if len(shape) == 2 else "experts")
    sampled, blind = rounding_costs(plan, weight, fisher, FORMATS), rounding_costs(plan, weight, None, FORMATS)
    monkeypatch.setattr(rounding_cost, "_FEWEST_ROWS", 1 << 30)
    exact, seen = rounding_costs(plan, weight, fisher, FORMATS), rounding_costs(plan, weight, None, FORMATS)
    for fmt in FORMATS:
        assert sampled[fmt][0] == pytest.approx(exact[fmt][0], rel=0.1), fmt
        assert sampled[fmt][1] == pytest.approx(exact[fmt][1], rel=0.1), fmt
        assert blind[fmt] == (0.0, pytest.approx(seen[fmt][1], rel=0.1)), fmt
    tensor = FORMATS[-1]
    assert sampled[tensor] == exact[tensor], "a format that ties rows together sees all of them"


def test_all_formats_are_off_together() -> None:
    """What counts is how formats compare: their ratios are nearer to the truth than each of them."""
    few, many = parse_format("int3:g32"), parse_format("int5:g32")
    for seed in range(4):
        weight, fisher = heavy((2048, 96), seed)
        sampled = rounding_costs(plan_of((2048, 96)), weight, fisher, [few, many])
        exact = {f: sum(c[f][0] for c in _by_rows(weight, fisher, [few, many])) for f in (few, many)}
        assert sampled[few][0] / sampled[many][0] == pytest.approx(exact[few] / exact[many], rel=0.05)


def _by_rows(weight: Tensor, fisher: Tensor, formats: list) -> list:
    """Every 64 rows for themselves, none of which is left out."""
    plan = plan_of((64, weight.shape[1]))
    return [rounding_costs(plan, w, f, formats) for w, f in zip(weight.split(64), fisher.split(64))]


def test_what_is_not_finite_is_found_in_rows_that_are_not_drawn() -> None:
    weight, fisher = heavy((2048, 96))
    fisher[5] = 0
    weight[5, 3] = torch.nan
    with pytest.raises(WeightError, match="w"):
        rounding_costs(plan_of((2048, 96)), weight, fisher, FORMATS)
