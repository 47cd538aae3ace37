"""The parts that tuners are made of: expanding with gradients, divergence in pieces, what is stored, descent."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.formats import QTensor, parse_format
from lowbit.pipeline.api import quantize_tensor
from lowbit.recipes.recipe import Recipe
from lowbit.tuning import divergence as divergence_module
from lowbit.tuning.divergence import divergence
from lowbit.tuning.gradient_descent import Moving, SignDescent, descend, linear, warm_cosine
from lowbit.tuning.weight import TunableVector, TunableWeight

FORMATS = [
    "int4:g32", "int8:channel", "int4:g24", "int8:tensor", "int4:16x16", "uint4:g32:asym", "uint4:g32:zero=fp16",
    "uint4:g32:zero=int32", "uint4:g32:min=fp16", "int3:g32:s=fp32", "iq4nl:g32", "nf4:g32:s=(uint8:g16:s=fp32)",
    "uint3:g16:s=(uint6:g8):min=(int6:g8)", "nvfp4", "mxfp4", "e4m3:channel", "ternary:g32", "kmeans4:channel",
    "int4:g32:s=bf16",
]  # fmt: skip


def quantized(fmt: str, shape: tuple[int, ...] = (40, 72), seed: int = 0) -> QTensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    return quantize_tensor(x, Recipe(parse_format(fmt)))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", [(40, 72), (3, 16, 48)])
def test_nothing_moves_before_it_is_moved(fmt: str, shape: tuple[int, ...]) -> None:
    q = quantized(fmt, shape)
    weight = TunableWeight(q)
    assert torch.equal(weight.dense(), q.dequantize())
    assert torch.equal(weight.dense(torch.bfloat16), q.dequantize(torch.bfloat16))
    before, after = q.parts(), weight.tuned().parts()
    assert list(before) == list(after)
    for name in before:
        # A nested scale keeps its values; the scale of its scales is taken anew of the same numbers.
        assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("fmt", FORMATS)
def test_gradients_are_those_of_the_formula(fmt: str) -> None:
    """Against a step of 1e-3 along each parameter's own gradient, and for simple formats against autograd."""
    q = quantized(fmt)
    weight, target = TunableWeight(q), torch.randn(40, 72, generator=torch.Generator().manual_seed(1))
    parameters = list(weight.parameters())
    if fmt == "mxfp4":
        assert not parameters  # powers of two cannot move a little
        return
    assert parameters
    (weight.dense() * target).sum().backward()
    smooth = [p for p in parameters if p is not getattr(getattr(weight.scale, "inner", None), "move", None)]
    smooth = [p for p in smooth if p is not getattr(getattr(weight.offset, "inner", None), "move", None)]
    for p in smooth:
        g = p.grad
        assert g is not None and float(g.norm()) > 0
        direction, h = g / g.norm(), 1e-2
        with torch.no_grad():
            p += h * direction
            up = float((weight.dense().double() * target).sum())
            p -= 2 * h * direction
            down = float((weight.dense().double() * target).sum())
            p += h * direction
        assert (up - down) / (2 * h) == pytest.approx(float(g.norm()), rel=2e-3)


@pytest.mark.parametrize("fmt", ["int4:g24", "uint4:g32:min=fp16", "uint4:g32:zero=fp16", "uint4:g32:asym"])
def test_gradients_equal_those_of_autograd_on_a_naive_loop(fmt: str) -> None:
    q = quantized(fmt)
    weight, target = TunableWeight(q), torch.randn(40, 72, generator=torch.Generator().manual_seed(1))
    (weight.dense() * target).sum().backward()
    level, size = q.format.grid.decode(q.unpacked()), q.format.block.cols
    s0, o0 = q.scales(), q.offsets()
    assert s0 is not None
    d, e = torch.zeros_like(s0, requires_grad=True), torch.zeros_like(s0, requires_grad=True)
    reach, total = max(abs(q.format.grid.lo), q.format.grid.hi), torch.zeros(())
    for r in range(40):
        for c in range(72):
            b = c // size
            s = s0[0, r, b] * (1 + d[0, r, b])
            w = s * level[r, c]
            if q.format.offset_kind == "min" and o0 is not None:
                w = w + o0[0, r, b] + e[0, r, b] * reach * s0[0, r, b].abs()
            elif o0 is not None:
                w = s * (level[r, c] - o0[0, r, b] - e[0, r, b] * reach)
            total = total + w * target[r, c]
    total.backward()
    assert weight.scale is not None and weight.scale.delta is not None and weight.scale.delta.grad is not None
    torch.testing.assert_close(weight.scale.delta.grad, d.grad, rtol=1e-4, atol=1e-5)
    if weight.offset is not None:
        assert weight.offset.delta is not None
        torch.testing.assert_close(weight.offset.delta.grad, e.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_stored_is_what_was_reached_but_for_the_rounding_of_its_type(fmt: str) -> None:
    q = quantized(fmt)
    weight = TunableWeight(q)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in weight.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    reached, stored = weight.dense().detach(), weight.tuned()
    assert torch.equal(stored.codes, q.codes)
    assert float((stored.dequantize() - reached).norm() / reached.norm()) < (2e-3 if "bf16" in fmt else 1e-3)
    if fmt != "mxfp4":
        assert float((reached - q.dequantize()).norm() / reached.norm()) > 0.01


def test_vectors_move_in_proportion_and_keep_their_type() -> None:
    vector, zero = TunableVector(torch.tensor([2.0, -1.0, 0.0]).bfloat16()), TunableVector(torch.zeros(3))
    with torch.no_grad():
        vector.delta += 0.5
        zero.delta += 0.5
    assert vector.tuned().dtype is torch.bfloat16
    rms = (5 / 3) ** 0.5
    torch.testing.assert_close(vector.dense().detach(), torch.tensor([3.0, -1.0 + 0.5 * rms, 0.5 * rms]))
    assert zero.dense().tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("piece", [1, 1 << 22])
def test_divergence_is_that_of_the_textbook(temperature: float, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence_module, "_CHUNK", piece)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(7, 19, generator=generator).requires_grad_()
    t = torch.randn(7, 19, generator=generator)
    found = divergence(z, t, temperature)
    (3 * found).backward()
    mine, z.grad = z.grad, None
    q, p = F.log_softmax(z.double() / temperature, -1), F.log_softmax(t.double() / temperature, -1)
    wanted = F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2
    (3 * wanted).backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(mine, z.grad, rtol=1e-4, atol=1e-6)
    assert float(divergence(t, t)) == 0


def test_rates_rise_and_fall() -> None:
    rates = [warm_cosine(i, 100) for i in range(100)]
    assert rates[0] < 0.11 and max(rates) == pytest.approx(rates[9], rel=0.05) and rates[-1] < 0.06
    assert all(a < b for a, b in pairwise(rates[:10])) and all(a > b for a, b in pairwise(rates[10:]))


def bowl(p: Tensor) -> Tensor:
    return ((p - 0.3) ** 2).sum()


def test_descent_finds_the_bottom_and_stays_at_the_best() -> None:
    p = torch.zeros(4, requires_grad=True)
    start, best, step = descend([Moving([p], 0.03)], lambda i: bowl(p), 100, score=lambda: float(bowl(p.detach())))
    assert start == pytest.approx(0.36) and best < 1e-3 and step in (25, 50, 75, 100)
    assert float(bowl(p.detach())) == best


@pytest.mark.parametrize("rate", [1e3, math.inf])
def test_descent_that_finds_nothing_better_ends_where_it_began(rate: float) -> None:
    p = torch.zeros(4, requires_grad=True)
    start, best, step = descend([Moving([p], rate)], lambda i: bowl(p), 20, score=lambda: float(bowl(p.detach())))
    assert (start, step) == (best, 0) and p.tolist() == [0, 0, 0, 0]


def test_signs_step_alike_and_stay_within_their_bound() -> None:
    p, far = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    groups = [Moving([p], 0.02), Moving([far], 0.02, 0.05)]
    descend(
        groups, lambda i: 1e-9 * bowl(p) + (far - 9).square().sum(), 100, score=lambda: float(bowl(p.detach())),
        optimizer=SignDescent, schedule=linear,
    )  # fmt: skip
    assert float(p.detach()) == pytest.approx(0.3, abs=0.02) and float(far.detach()) == pytest.approx(0.05)
    assert [linear(i, 4) for i in range(4)] == [1, 0.75, 0.5, 0.25]
