"""Weights of any size: a power of two changes the exponent of the format, and nothing else of what is stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lowbit
from lowbit.errors import FormatError
from lowbit.formats import QTensor, encode, parse_format
from lowbit.interchange.tensors import TensorPlan
from lowbit.recipes.recipe import Recipe
from lowbit.solvers.ranging import in_range
from lowbit.solvers.stats import Stats, StatsBuilder
from lowbit.weights.solve import Solved, solve, solve_group

# Every store: fp16, e4m3, bf16 and e8m0 scales, a float minimum, nested scales and minima, learned levels with and without one.
RECIPES = (
    "w8", "w4", "w3", "q4_k", "iq4nl:g32", "hqq", "zeroquant", "int4:g32:s=e4m3", "int4:g32:s=bf16", "mxfp4", "nvfp4",
    "uint4:g32:min=fp16", "kmeans4:g64", "kmeans4:g64:cb=tensor", "int8:channel",
)  # fmt: skip
POWERS = (-30, -20, -15, 12, 20, 40)


def weight(rows: int = 16, cols: int = 256, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.05


def off(made: Tensor, true: Tensor) -> float:
    return float((made.double() - true.double()).norm() / true.double().norm())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_error_does_not_depend_on_the_size(recipe: str) -> None:
    usual = off(lowbit.quantize_tensor(weight(), recipe).dequantize(), weight())
    for power in POWERS:
        x = weight() * 2.0**power
        q = lowbit.quantize_tensor(x, recipe)
        assert off(q.dequantize(), x) <= 1.002 * usual, power
        assert q.format.plain == Recipe.parse(recipe).format
        assert {k: v.shape for k, v in q.parts().items()} == {
            k: size for k, (_, size) in q.format.plain.parts(q.shape).items()
        }


def test_weights_of_usual_size_are_stored_as_ever() -> None:
    for recipe in RECIPES:
        assert recipe == "int4:g32:s=e4m3" or not lowbit.quantize_tensor(weight(), recipe).format.exponent


@pytest.mark.parametrize("recipe", ["w8", "w4", "int8:channel", "uint4:g32:min=fp16", "q6_k"])
@pytest.mark.parametrize("power", [-15, -26])
def test_a_tiny_row_of_a_usual_weight(recipe: str, power: int) -> None:
    x = weight()
    usual = off(lowbit.quantize_tensor(x, recipe).dequantize()[5], x[5])
    x[5] *= 2.0**power
    assert off(lowbit.quantize_tensor(x, recipe).dequantize()[5], x[5]) <= 1.05 * usual


@pytest.mark.parametrize("text", ["int4:g32:x=-21", "kmeans4:g64:x=-21", "uint4:g32:min=fp16:x=7", "q4_k"])
def test_reading_with_an_exponent(text: str) -> None:
    """All that reads a QTensor gives 2^x times what it gives without: values, rows, scales, minima, codes of its own values."""
    fmt = parse_format(text)
    assert parse_format(str(fmt)) == fmt
    plain = lowbit.quantize_tensor(weight(), str(fmt.plain))
    q = QTensor.from_parts(fmt, plain.shape, plain.parts())
    factor, rows = 2.0**fmt.exponent, torch.tensor([3, 0, 3])
    assert torch.equal(q.dequantize(), plain.dequantize() * factor)
    assert torch.equal(q.index(rows), q.dequantize()[rows])
    if fmt.scale is not None:
        again = encode(q.dequantize(), fmt, q.scales(), None if q.offset is None else -q.offsets() / q.scales())
        assert off(again.dequantize(), q.dequantize()) < 2e-2
    if fmt.offset_kind == "min":
        assert torch.equal(q.offsets(), plain.offsets() * factor)


@pytest.mark.parametrize(
    "text", ["int4:g32:x=1.5", "int4:g32:x=", "int4:g32:x=-1000", "int4:g32:x=٣", "int4:g32:s=(uint6:g8:x=2)"]
)
def test_what_is_no_exponent(text: str) -> None:
    with pytest.raises(FormatError):
        parse_format(text)


def planned(x: Tensor, fmt: str, name: str = "w") -> TensorPlan:
    return TensorPlan(name, tuple(x.shape), "linear", x.dtype, False, parse_format(fmt), None)


def test_weights_of_a_group_have_exponents_of_their_own() -> None:
    builder = StatsBuilder(256)
    builder.add(torch.randn(400, 256, generator=torch.Generator().manual_seed(1)))
    stats: Stats = builder.stats()
    recipe = Recipe.parse("gptq@int4:g32")
    xs = [weight(), weight(seed=2) * 2.0**-22]
    both = solve_group([planned(x, "int4:g32", n) for n, x in zip("ab", xs)], xs, recipe, stats)
    assert both[0].exponent == 0 and both[1].exponent < -20
    usual = solve_group([planned(xs[0], "int4:g32")], [weight(seed=2)], recipe, builder.stats())[0]
    assert torch.equal(both[1].stored["b.codes"], usual.stored["w.codes"])
    assert both[1].error == pytest.approx(usual.error, rel=1e-3) and both[1].output is not None


def warned(x: Tensor, fmt: str) -> Solved:
    return solve(planned(x, fmt), x, Recipe.parse(f"search@{fmt}"))


def test_what_no_exponent_holds_is_said() -> None:
    x = weight(64, 256)
    assert not any(warned(x, fmt).warning for fmt in ("int4:g32", "nvfp4", "nf4-dq"))
    x[7] *= 2.0**-60
    assert "8 of 512 blocks" in warned(x, "int4:g32").warning and warned(x, "int4:g32").exponent == 0
    assert not warned(x, "int8:channel").warning
    x[7] = weight()[7] * 2.0**-24
    assert "16 of 1,024 blocks" in warned(x, "nvfp4").warning


def test_sources_of_sixteen_bits_and_of_nothing() -> None:
    x = (weight() * 2.0**-24).to(torch.bfloat16)
    assert off(lowbit.quantize_tensor(x, "w8").dequantize(), x.float()) < 0.01
    assert in_range(torch.zeros(4, 32), parse_format("int4:g32")).exponent == 0
    assert in_range(torch.zeros(0, 32), parse_format("int4:g32")).exponent == 0
