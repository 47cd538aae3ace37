"""Scales stored in few bits, chosen for the layer's output: against brute force, and their own promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lowbit.formats import QTensor, parse_format
from lowbit.solvers import Call
from lowbit.solvers.nested import Layout, round_nested
from lowbit.solvers.refit import refit_scales, refits
from lowbit.solvers.stats import Stats, StatsBuilder

K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs")


def problem(rows: int, cols: int, tokens: int) -> tuple[Tensor, Tensor, Stats]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator) * torch.rand(rows, cols // 16, generator=generator).add(
        0.3
    ).repeat_interleave(16, 1)
    mixing = torch.randn(cols, cols, generator=generator) * torch.rand(cols, generator=generator).square() * 2
    inputs = torch.randn(tokens, cols, generator=generator) @ mixing
    builder = StatsBuilder(cols)
    builder.add(inputs)
    return weight, inputs, builder.stats()


def output_error(q: QTensor, weight: Tensor, stats: Stats) -> Tensor:
    """Of each row, float64 [N]."""
    error = (q.dequantize() - weight).double()
    return ((error @ stats.second_moment.double()) * error).sum(1)


@pytest.mark.parametrize("fmt", K_QUANTS)
def test_the_refit_lowers_the_error_of_every_row_and_moves_no_code(fmt: str) -> None:
    weight, _, stats = problem(20, 512, 900)
    q = Call("rtn")(weight, parse_format(fmt), Call("search"), stats)
    assert refits(q)
    new = refit_scales(q, weight, stats.second_moment)
    before, after = output_error(q, weight, stats), output_error(new, weight, stats)
    assert torch.equal(new.codes, q.codes)
    assert bool((after <= before * (1 + 1e-4)).all())
    assert float(after.sum()) < 0.98 * float(before.sum()), (before.sum(), after.sum())
    assert QTensor.from_parts(new.format, new.shape, new.parts()).dequantize().equal(new.dequantize())


@pytest.mark.parametrize(
    ("store", "sign"), [("uint2:g4", 1), ("uint2:g4", -1), pytest.param("int3:g2", 1, marks=pytest.mark.slow)]
)
def test_integers_and_their_scale_come_near_the_best_there_are(store: str, sign: int) -> None:
    """All integers are tried, each with the least-squares scales; float64."""
    how, count, rows = parse_format(f"{store}:s=fp32"), 4, 12
    generator = torch.Generator().manual_seed(1)
    answer = torch.rand(rows, count, generator=generator) * sign
    if how.grid.signed:
        answer = answer - 0.5
    root = torch.randn(rows, count, count, generator=generator, dtype=torch.float64)
    normal = root @ root.transpose(1, 2) + 0.1 * torch.eye(count)
    layout = Layout.of([how], [sign], count)
    runs = count // how.block.cols
    step = torch.full((rows, runs), sign / 3)
    present = layout.integers(answer, step) * step[:, layout.member]
    found, steps = round_nested(answer, normal, layout, present, step)

    def error(s: Tensor, row: int) -> float:
        left = s.double() - answer[row].double()
        return float(left @ normal[row] @ left)

    ratios = []
    for row in range(rows):
        levels = [int(v) for v in how.grid.levels]
        best = float("inf")
        for t in itertools.product(levels, repeat=count):
            basis = torch.zeros(count, runs, dtype=torch.float64)
            basis[range(count), layout.member] = torch.tensor(t, dtype=torch.float64)
            inner = basis.T @ normal[row] @ basis + 1e-12 * torch.eye(runs)
            d = torch.linalg.solve(inner, basis.T @ normal[row] @ answer[row].double())
            if how.grid.signed or bool((d * sign >= 0).all()):
                best = min(best, error(basis @ d, row))
        mine = error(found[row], row)
        assert mine <= error(present[row], row) * (1 + 1e-6)
        assert best <= mine * (1 + 1e-6) + 1e-12
        ratios.append((mine + 1e-3) / (best + 1e-3))
        t = found[row] / steps[row][layout.member]
        assert torch.allclose(t, t.round(), atol=1e-4)
        assert int(t.round().min()) >= min(levels) and int(t.round().max()) <= max(levels)
    assert sorted(ratios)[rows // 2] < 1.3, ratios


def test_scales_that_run_across_rows_are_left_alone() -> None:
    weight, _, stats = problem(4, 96, 200)
    q = Call("rtn")(weight, parse_format("q4_k"), Call("search"), stats)  # 3 scales a row, runs of 8
    assert not refits(q)
