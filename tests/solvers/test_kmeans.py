"""k-means against exact dynamic programming, and its codebooks per tensor, channel and group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.formats import QTensor, parse_format
from lowbit.solvers import Call
from strategies import normal, steady, weighing

SEEDS = st.integers(0, 10**6)


def kmeans(x: Tensor, text: str, v: Tensor | None = None, fit: str = "search", **options: int) -> QTensor:
    return Call("kmeans", tuple(options.items()))(x, parse_format(text), Call(fit), weighing(v))


def exact(x: np.ndarray, v: np.ndarray, count: int) -> float:
    """The least weighted sum of squares of any `count` levels: clusters of sorted values, by dynamic programming."""
    order = np.argsort(x, kind="stable")
    x, v = x[order].astype(np.float64), v[order].astype(np.float64)
    mass, first, second = (np.concatenate([[0.0], np.cumsum(v * x**k)]) for k in (0, 1, 2))
    n = len(x)
    i, j = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    m = mass[j] - mass[i]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = second[j] - second[i] - np.where(m > 0, (first[j] - first[i]) ** 2 / m, 0)
    cost = np.where(j >= i, np.maximum(cost, 0), np.inf)
    best = cost[0]
    for _ in range(count - 1):
        best = (best[:, None] + cost).min(0)
    return float(best[-1])


def sse(x: Tensor, q: QTensor, v: Tensor | None = None) -> float:
    weight = 1.0 if v is None else v.double()
    return float(((q.dequantize().double() - x.double()).square() * weight).sum())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_lloyd_is_close_to_the_exact_optimum(bits, weighted):
    """A local minimum: 10 % above the global one on average at most, over normal, uniform and heavy-tailed rows."""
    rows = [normal((150,), 1), torch.rand(150, generator=torch.Generator().manual_seed(2)), normal((150,), 3) ** 3]
    x = torch.stack([*rows, normal((150,), 4).abs(), *normal((4, 150), 5)])
    v = normal(tuple(x.shape), 6).square() + 0.01 if weighted else torch.ones_like(x)
    q = kmeans(x, f"kmeans{bits}:channel:l=fp32", v if weighted else None, iterations=100)
    ratios = []
    for row in range(len(x)):
        found = float(((q.dequantize()[row].double() - x[row].double()).square() * v[row].double()).sum())
        ratios.append(found / exact(x[row].numpy(), v[row].numpy(), 1 << bits))
    assert min(ratios) >= 1 - 1e-5
    assert np.mean(ratios) <= 1.10 and max(ratios) <= 1.35


@pytest.mark.parametrize("block", ["tensor", "channel", "g16"])
@steady(20)
@given(SEEDS, st.integers(1, 8))
def test_few_distinct_values_are_exact(block, seed, bits):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1 << bits, generator=generator).half().float()
    x = values[torch.randint(0, len(values), (6, 40), generator=generator)]
    assert torch.equal(kmeans(x, f"kmeans{bits}:{block}").dequantize(), x)


@pytest.mark.parametrize("block", ["tensor", "channel", "g16", "2x8"])
def test_each_codebook_block_learns_its_own_levels(block):
    x = normal((6, 48), 7) * torch.tensor([1.0, 10, 100, 1000, 1, 1])[:, None]
    fmt = parse_format(f"kmeans3:{block}")
    q = kmeans(x, f"kmeans3:{block}")
    assert tuple(q.levels.shape) == (*fmt.block.counts((6, 48)), 8) and q.scale is None
    assert bool((q.levels.diff(dim=-1) >= 0).all())
    if block != "tensor":
        assert sse(x, q) < sse(x, kmeans(x, "kmeans3:tensor"))


def test_kmeans_beats_evenly_spaced_levels():
    x = normal((20, 256), 8)
    even = Call("rtn")(x, parse_format("uint3:channel:zero=fp32"), Call("minmax"), None)
    best = Call("rtn")(x, parse_format("uint3:channel:zero=fp32"), Call("search", (("emphasis", 0),)), None)
    assert sse(x, kmeans(x, "kmeans3:channel")) < min(0.6 * sse(x, even), sse(x, best))


def test_importance_draws_the_levels():
    x = normal((4, 200), 9)
    v = torch.where(x > 1, 100.0, 0.01)
    weighted, plain = kmeans(x, "kmeans2:channel", v), kmeans(x, "kmeans2:channel")
    assert sse(x, weighted, v) < 0.3 * sse(x, plain, v) and sse(x, plain) < sse(x, weighted)
    assert torch.equal(kmeans(x, "kmeans2:channel", torch.full((1, 200), 3.0)).dequantize(), plain.dequantize())


def test_levels_are_means_of_what_they_own():
    """The fixed point of Lloyd: one more step changes nothing."""
    x = normal((3, 300), 10)
    q = kmeans(x, "kmeans3:channel:l=fp32", iterations=500)
    codes = q.unpacked()
    for row in range(3):
        for code in range(8):
            owned = x[row][codes[row] == code].double()
            assert len(owned) and float(q.levels[0, row, 0, code]) == pytest.approx(float(owned.mean()), abs=1e-5)


def test_a_shared_codebook_with_scales():
    x = normal((32, 96), 11) * torch.logspace(-2, 2, 32)[:, None]
    q = kmeans(x, "kmeans4:g32:cb=tensor")
    assert tuple(q.levels.shape) == (1, 1, 1, 16) and tuple(q.scale.shape) == (1, 32, 3)
    relative = ((q.dequantize() - x).norm(dim=1) / x.norm(dim=1)).max()
    fixed = Call("rtn")(x, parse_format("int4:g32"), Call("absmax"), None)
    assert relative < 0.12
    assert float(relative) < float(((fixed.dequantize() - x).norm(dim=1) / x.norm(dim=1)).max())


def test_rounds_of_scale_and_codebook_pay_off():
    x = normal((64, 128), 12)
    once, thrice = kmeans(x, "kmeans3:g32:cb=tensor", rounds=0), kmeans(x, "kmeans3:g32:cb=tensor", rounds=2)
    assert sse(x, thrice, x.abs()) < sse(x, once, x.abs())


def test_experts_have_codebooks_of_their_own():
    x = normal((3, 8, 64), 13) * torch.tensor([1.0, 5.0, 0.1])[:, None, None]
    q = kmeans(x, "kmeans4:g32:cb=tensor")
    for expert in range(3):
        alone = kmeans(x[expert], "kmeans4:g32:cb=tensor")
        assert torch.equal(q.dequantize()[expert], alone.dequantize())


@pytest.mark.parametrize("store", ["fp16", "e8m0", "(uint8:g8)"])
@pytest.mark.parametrize("fit", ["search", "absmax", "mse"])
@pytest.mark.parametrize("data", ["negative", "positive", "with zeros"])
def test_one_sided_weights(store, fit, data):
    x = normal((8, 64), 14).abs() + 0.05
    x = {"negative": -x, "positive": x, "with zeros": torch.where(x > 1, 0.0, -x)}[data]
    q = kmeans(x, f"kmeans4:g32:cb=tensor:s={store}", fit=fit)
    assert float((q.dequantize() - x).norm() / x.norm()) < 0.25


def test_mixed_signs_with_two_positive_levels():
    x = normal((4, 64), 15).abs() + 1
    x[0, 0] = -0.01
    assert float((kmeans(x, "kmeans1:g32:cb=tensor").dequantize() - x).norm() / x.norm()) < 0.5


def test_a_large_block_is_summarised_without_loss_to_speak_of(monkeypatch):
    from lowbit.solvers.methods import kmeans as module

    x = normal((1, 20000), 16)
    full = kmeans(x, "kmeans4:tensor", iterations=60)
    monkeypatch.setattr(module, "_LARGE", 1000)
    binned = kmeans(x, "kmeans4:tensor", iterations=60)
    assert not torch.equal(full.levels, binned.levels)
    assert sse(x, binned) < 1.02 * sse(x, full)


def test_formats_that_kmeans_cannot_fill_are_errors():
    with pytest.raises(RecipeError, match="has fixed ones"):
        kmeans(torch.ones(2, 4), "int4:g4")
    with pytest.raises(RecipeError, match="cannot learn the levels"):
        Call("rtn")(torch.ones(2, 4), parse_format("kmeans4"), Call("absmax"), None)
    with pytest.raises(RecipeError, match="cb=tensor"):
        kmeans(torch.ones(2, 8), "kmeans4:g4:cb=channel")
