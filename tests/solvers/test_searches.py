"""Fits that search: never worse than the range, close to a fine scan, and least squares where they claim it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.formats import Format, encode, parse_format
from lowbit.solvers import Call
from strategies import normal, weighing

SYMMETRIC = ["int2", "int3", "int4", "int6", "int8", "int4:narrow", "ternary", "binary", "e2m1", "nf4", "iq4nl", "e4m3"]
AFFINE = [f"{grid}:g32:{kind}" for grid in ("uint2", "int3", "uint4", "uint8") for kind in
          ("asym", "zero=int32", "zero=fp32", "zero=fp16", "min=fp16")]  # fmt: skip


def samples(kind: str) -> Tensor:
    """64 blocks of 32: normal, heavy-tailed, one-sided, or far from zero."""
    x = normal((64, 32), 11)
    if kind == "heavy":
        x = x / normal((64, 32), 12).abs().clamp_min(0.3)
    return {"positive": x.abs() + 0.1, "far": x * 0.1 + 1}.get(kind, x)


def errors(x: Tensor, fmt: Format, fit: Call, v: Tensor | None = None) -> Tensor:
    """Sum of v (x - x_q)^2 for each block (row), in float64, of what is stored in the end."""
    q = Call("rtn")(x, fmt, fit, weighing(v))
    weight = 1.0 if v is None else v.double()
    return ((q.dequantize().double() - x.double()).square() * weight).sum(1)


@pytest.mark.parametrize("kind", ["normal", "heavy", "positive", "far"])
@pytest.mark.parametrize("store", ["fp32", "fp16", "e8m0"])
@pytest.mark.parametrize("grid", SYMMETRIC)
@pytest.mark.parametrize("weighted", [False, True])
def test_searches_are_never_worse_than_absmax(kind, store, grid, weighted):
    x, fmt = samples(kind), parse_format(f"{grid}:g32:s={store}")
    v = normal((64, 32), 5).abs() + 0.01 if weighted else None
    base = errors(x, fmt, Call("absmax"), v)
    # What is lost in storing the scale: 2^-11 of it, which shows where the error is as small as int8's.
    slack = 1 + (0.05 if fmt.grid.bits > 4 else 0.002) + 1e-4
    for fit in (Call("mse"), Call("search", (("emphasis", 0),))):
        assert bool((errors(x, fmt, fit, v) <= base * slack + 1e-12).all()), fit
    assert float(errors(x, fmt, Call("search", (("emphasis", 0),)), v).sum()) <= float(base.sum())


@pytest.mark.parametrize("kind", ["normal", "heavy", "positive", "far"])
@pytest.mark.parametrize("text", AFFINE)
def test_searches_are_never_worse_than_minmax(kind, text):
    x, fmt = samples(kind), parse_format(text)
    base = errors(x, fmt, Call("minmax"))
    for fit in (Call("mse"), Call("search", (("emphasis", 0),))):
        assert bool((errors(x, fmt, fit) <= base * 1.001 + 1e-12).all()), fit


@pytest.mark.parametrize("kind", ["normal", "heavy", "positive", "far"])
@pytest.mark.parametrize("text", [*AFFINE, "uint4:g32:zero=fp32:s=fp32", "uint3:g32:min=fp32:s=fp32"])
def test_hqq_is_never_worse_than_minmax_in_mean_error(kind, text):
    x, fmt = samples(kind), parse_format(text)
    ours, base = (
        (Call("rtn")(x, fmt, Call(name), None).dequantize() - x).abs().double().mean(1) for name in ("hqq", "minmax")
    )
    assert bool((ours <= base * 1.001 + 1e-12).all())


def test_hqq_pays_off_on_outliers():
    x = samples("normal")
    x[:, 7] = 9
    fmt = parse_format("uint3:g32:zero=fp32")
    ours, base = ((Call("rtn")(x, fmt, Call(n), None).dequantize() - x).abs().mean() for n in ("hqq", "minmax"))
    assert float(ours) < 0.97 * float(base)


def scan(x: Tensor, fmt: Format, v: Tensor, signs: tuple[int, ...]) -> Tensor:
    """Least sum of v (x - x_q)^2 over 500 scales a sign: the oracle of a symmetric search."""
    factors = torch.linspace(0.3, 1.3, 500)
    factors = torch.cat([factors * sign for sign in signs])
    scales = factors[:, None, None] * (x.abs().amax(1, keepdim=True) / fmt.grid.hi)
    error = (fmt.grid.round(x / scales) * scales - x).square() * v
    return error.sum(2, dtype=torch.float64).amin(0)


@pytest.mark.parametrize(
    ("grid", "mean", "tail"),
    [("int3", 1.02, 1.05), ("int4", 1.02, 1.10), ("e2m1", 1.04, 1.20), ("ternary", 1.03, 1.15), ("iq4nl", 1.04, 1.18)],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_search_is_close_to_a_fine_scan(grid, mean, tail, weighted):
    generator = torch.Generator().manual_seed(1)
    x, fmt = torch.randn(80, 32, generator=generator), parse_format(f"{grid}:g32:s=fp32")
    v = torch.randn(80, 32, generator=generator).square() + 0.01 if weighted else torch.ones_like(x)
    oracle = scan(x, fmt, v, (1, -1) if fmt.grid.name in ("int3", "int4", "iq4nl") else (1,))
    found = errors(x, fmt, Call("search", (("emphasis", 0),)), v)
    assert float((found / oracle).mean()) <= mean
    assert float((found / oracle).quantile(0.95)) <= tail


def test_search_without_importance_weighs_by_magnitude():
    x, fmt = samples("heavy"), parse_format("int3:g32:s=fp32")
    implicit = Call("rtn")(x, fmt, Call("search"), None)
    explicit = Call("rtn")(x, fmt, Call("search"), weighing(x.abs()))
    assert torch.equal(implicit.scale, explicit.scale)
    squares = Call("rtn")(x, fmt, Call("search", (("emphasis", 0),)), None)
    assert not torch.equal(implicit.scale, squares.scale)
    assert float(errors(x, fmt, Call("search"), x.abs()).sum()) < float(
        ((squares.dequantize() - x).double().square() * x.abs()).sum()
    )


@pytest.mark.parametrize("text", ["int4:g32:s=fp32", "uint4:g32:min=fp32:s=fp32", "uint4:g32:zero=fp32:s=fp32"])
def test_search_ends_at_the_least_squares_refit(text):
    """numpy's lstsq on the codes found gains nothing, or next to it: the refinement stops after two rounds."""
    x, fmt = samples("normal"), parse_format(text)
    v = normal((64, 32), 3).abs() + 0.05
    q = Call("rtn")(x, fmt, Call("search"), weighing(v))
    levels, root = fmt.grid.decode(q.unpacked()).double().numpy(), v.double().sqrt().numpy()
    found = errors(x, fmt, Call("search"), v).numpy()
    settled = 0
    for row in range(64):
        columns = [levels[row]] if fmt.offset is None else [levels[row], np.ones(32)]
        matrix, target = np.stack(columns, 1) * root[row][:, None], x[row].double().numpy() * root[row]
        solution = np.linalg.lstsq(matrix, target, rcond=None)[0]
        assert found[row] <= 1.1 * ((matrix @ solution - target) ** 2).sum()
        settled += float(q.scales()[0, row, 0]) == pytest.approx(solution[0], rel=1e-4)
    assert settled >= 48


def test_int4_search_uses_the_eighth_negative_level():
    x = samples("normal")
    q = Call("rtn")(x, parse_format("int4:g32"), Call("search"), None)
    assert int((q.unpacked() == 0).any(1).sum()) > 40 and bool((q.scales() < 0).any())


@pytest.mark.parametrize(
    "text", ["e2m1:g16:s=(e4m3:tensor)", "int8:g32:narrow", "int4:g32:s=(uint8:g256)", "e2m1:g32:s=e8m0"]
)
def test_scales_stay_positive_where_a_sign_gains_nothing_or_cannot_be_kept(text):
    q = Call("rtn")(samples("normal"), parse_format(text), Call("search"), None)
    assert bool((q.scales() >= 0).all())


def test_search_beats_absmax_by_a_quarter_at_four_bits():
    """The reason for it being the everyday fit: squared error of int4:g32 on normal data."""
    x, fmt = normal((500, 32), 8), parse_format("int4:g32")
    assert float(errors(x, fmt, Call("search")).sum()) < 0.78 * float(errors(x, fmt, Call("absmax")).sum())


def test_a_scale_given_by_hand_is_kept():
    x = samples("normal")
    q = encode(x, parse_format("int4:g32:s=fp32"), torch.full((1, 64, 1), 0.25))
    assert bool((q.scales() == 0.25).all())
    assert torch.equal(q.dequantize(), (x / 0.25).round().clamp(-8, 7) * 0.25)
