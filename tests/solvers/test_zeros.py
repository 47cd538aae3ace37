"""Rows, halves of rows and groups of zeros come back as zeros from every fit and solver, in every preset's format."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from lowbit.formats import Format, parse_format
from lowbit.recipes.presets import PRESETS
from lowbit.recipes.recipe import Recipe
from lowbit.solvers.registry import Call, methods
from lowbit.solvers.stats import Stats, StatsBuilder
from lowbit.solvers.zeros import zero_runs

TEXTS = (
    "binary:g32",
    "ternary:g32",
    "q4_k",
    "q6_k",
    "kmeans4:g64:cb=tensor",
    "uint4:g32:min=fp16",
    "int4:g32:zero=int32",
)
FORMATS = sorted(
    {str(Recipe.parse(t).format) for p in PRESETS.values() for t in (p.text, p.calibrated) if t} | {str(parse_format(t)) for t in TEXTS}
)  # fmt: skip


@cache
def weight() -> Tensor:
    w = torch.randn(12, 256, generator=torch.Generator().manual_seed(3)) * 0.05
    w[[0, 5, 11]] = 0
    w[3, 128:] = 0
    w[4, :128] = 0
    return w


@cache
def statistics() -> Stats:
    generator = torch.Generator().manual_seed(4)
    mix = torch.eye(256) + 0.1 * torch.randn(256, 256, generator=generator)
    x = torch.randn(300, 256, generator=generator) @ mix
    builder = StatsBuilder(256, drift=True)
    builder.add(x, x + 0.05 * torch.randn(x.shape, generator=generator))
    return builder.stats()


def pairs(fmt: Format) -> list[tuple[Call, Call]]:
    """Every solver that fills `fmt` with every fit: round-to-nearest with all of them, the others with three."""
    found = []
    for solver, method in methods("solver").items():
        if method.declines(fmt) is not None:
            continue
        fits = [name for name, fit in methods("fit").items() if fmt.scale is None or fit.declines(fmt) is None]
        wanted = fits if solver == "rtn" else [f for f in fits if f in ("absmax", "minmax", "search")]
        found += [(Call(solver), Call(fit)) for fit in wanted]
    return found


@pytest.mark.parametrize("text", FORMATS)
def test_zeros_stay_zeros(text: str) -> None:
    fmt, w = parse_format(text), weight()
    for solver, fit in pairs(fmt):
        known = (None, statistics()) if solver.method.needs == "nothing" else (statistics(),)
        for stats in known:
            made = solver(w.clone(), fmt, fit, stats).dequantize()
            assert not bool(made[w == 0].any()), (solver.name, fit.name, stats is not None)
            rest = w != 0
            error = float((made - w)[rest].norm() / w[rest].norm())
            assert fmt.grid.bits < 3 or error < 0.6, (solver.name, fit.name, error)


def test_which_zeros_are_meant() -> None:
    fmt = parse_format("int4:channel")
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    w[0, ::2] = 0  # as pruning leaves them: free to make up for the others
    assert zero_runs(w, fmt) is None
    w[1, 10:26] = 0
    w[2, 3:18] = 0  # one short of a run
    found = zero_runs(w, fmt)
    assert found is not None
    naive = torch.zeros_like(w, dtype=torch.bool)
    for i in range(4):
        for j in range(64 - 15):
            if not bool(w[i, j : j + 16].any()):
                naive[i, j : j + 16] = True
    assert torch.equal(found, naive) and int(found.sum()) == 16
    groups = zero_runs(torch.tensor([[0.0] * 8 + [1.0] * 8]), parse_format("int4:g8"))
    assert groups is not None and int(groups.sum()) == 8


def test_other_weights_are_as_ever() -> None:
    """A zero or two by chance move no zero-point and no level."""
    w = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    w[2, 7] = 0
    made = Call("rtn")(w, parse_format("uint8:channel:zero=fp32"), Call("minmax"), None)
    low, high = w.amin(1), w.amax(1)
    assert torch.allclose(made.offsets().view(-1), -low / ((high - low) / 255), rtol=1e-5)
