"""Feedback and polish by the C++ part, with every set of instructions, beside PyTorch's and by their own promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.formats import parse_format
from lowbit.kernels.core import core
from lowbit.solvers import Call, feedback
from lowbit.solvers.core_steps import CoreSteps, core_takes
from lowbit.solvers.feedback import columns_in_order
from lowbit.solvers.fitting import fit_blocks
from lowbit.solvers.found import Found
from lowbit.solvers.hessian import factorize
from lowbit.solvers.rounding import empty
from lowbit.solvers.stats import Stats, StatsBuilder
from lowbit.solvers.steps import Steps, TorchSteps
from lowbit.solvers.zeros import zero_runs

module: Any = core()
pytestmark = pytest.mark.skipif(module is None, reason="the C++ core is not built")
ISAS = module.isas() if module is not None else ["portable"]
PLAIN = (
    "int4:g32",
    "int4:g32:asym",
    "iq4nl:g32",
    "nf4:g64",
    "int2:g8",
    "int8:channel",
    "int4:g50",
    "ternary:g128",
    "int3:g32:s=bf16",
)
MINIMA = ("uint4:g32:min=fp16", "uint2:g16:s=fp32:min=fp32", "uint8:channel:min=bf16")
# Scales that are not refitted, or not by the C++ part.
OTHERS = (
    "mxfp4",
    "nvfp4",
    "int4:16x16",
    "int4:tensor",
    "uint3:g32:s=(uint6:g8):min=(int6:g8)",
    "int4:g32:s=(e4m3:g16)",
)


def problem(rows: int, cols: int, seed: int = 0) -> tuple[Tensor, Stats]:
    """Weights, some of which are runs of zeros, and statistics of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    mixing = torch.randn(cols, cols, generator=generator) * torch.rand(cols, generator=generator).square() * 2
    builder = StatsBuilder(cols)
    builder.add(torch.randn(3 * cols, cols, generator=generator) @ mixing)
    return weight, builder.stats()


def solved(steps: Steps, weight: Tensor, stats: Stats, fmt: str, method: str = "gptq", **options: Any) -> Found:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feedback, "steps_for", lambda fmt, weight: steps)
        return Call(method, tuple(options.items())).solve(weight, parse_format(fmt), Call("search"), stats)


def agree(found: Found, right: Found, bound: float = 1e-5) -> None:
    """Errors within rounding, and all codes but those between two levels."""
    assert found.trace is not None and right.trace is not None
    assert found.trace.start == pytest.approx(right.trace.start, rel=1e-6)
    assert found.trace.end == pytest.approx(right.trace.end, rel=bound)
    assert (found.weight.unpacked() != right.weight.unpacked()).float().mean() < 2e-3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", [*PLAIN, *MINIMA, *OTHERS])
def test_the_result_is_that_of_the_readable_python(isa: str, fmt: str) -> None:
    for shape in ((33, 100), (17, 208)):
        weight, stats = problem(*shape)
        assert core_takes(parse_format(fmt), weight)
        for polish in (0, 2):
            right = solved(TorchSteps(), weight, stats, fmt, polish=polish)
            agree(solved(CoreSteps(isa), weight, stats, fmt, polish=polish), right, 1e-4 if fmt in MINIMA else 1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("method", ["gptaq", "qronos"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_shifts_targets_and_orders(isa: str, method: str, order: int) -> None:
    weight, stats = problem(20, 144)
    generator = torch.Generator().manual_seed(1)
    change = torch.randn(144, 144, generator=generator) * 0.02
    stats = replace(stats, drift=change @ stats.second_moment)
    right = solved(TorchSteps(), weight, stats, "int4:g32", method, order=order)
    agree(solved(CoreSteps(isa), weight, stats, "int4:g32", method, order=order), right)


@pytest.mark.parametrize("fmt", ["int4:g32:asym", "iq4nl:g32", "uint4:g32:min=fp16", "int4:channel"])
def test_runs_of_zeros_stay_zero(fmt: str) -> None:
    weight, stats = problem(24, 160)
    weight[3, 20:70], weight[7], weight[:, 96:128] = 0, 0, 0
    right = solved(TorchSteps(), weight, stats, fmt)
    found = solved(CoreSteps(), weight, stats, fmt)
    agree(found, right, 1e-4)
    still = zero_runs(weight, parse_format(fmt))
    assert still is not None
    if fmt != "iq4nl:g32":  # which has no level at zero
        assert bool((found.weight.dequantize()[still] == 0).all())


@pytest.mark.parametrize("isa", ISAS)
def test_products_that_are_not_kept_are_computed_again(isa: str) -> None:
    weight, stats = problem(19, 176)
    for fmt in ("int4:g16", "uint4:g16:min=fp16"):
        agree(solved(CoreSteps(isa, 0), weight, stats, fmt), solved(CoreSteps(isa), weight, stats, fmt), 1e-4)


def bytes_of(found: Found) -> list[Tensor]:
    return list(found.weight.parts().values())


def test_the_same_bytes_for_any_number_of_threads_and_whatever_rows_are_solved_together() -> None:
    weight, stats = problem(150, 96)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            factor = factorize(stats, 0.01, columns_in_order(stats.second_moment.diagonal(), 1, 32))
            for fmt in ("int4:g32", "uint4:g32:min=fp16"):
                form = parse_format(fmt)
                scale, offset = fit_blocks(weight, form, Call("search"), stats.importance)
                q = empty(form, (150, 96), scale, offset)
                found.append([*CoreSteps().solve(q, weight, factor, None, None, 2)])
    finally:
        torch.set_num_threads(before)
    for other in found[2:]:
        right = found[0] if other[0].format == found[0][0].format else found[1]
        assert all(torch.equal(a, b) for a, b in zip(other[0].parts().values(), right[0].parts().values(), strict=True))
        assert torch.equal(other[1], right[1]) and torch.equal(other[2], right[2])
    whole = solved(CoreSteps(), weight, stats, "int4:g32").weight.dequantize()
    assert torch.equal(solved(CoreSteps(), weight[40:57], stats, "int4:g32").weight.dequantize(), whole[40:57])


@pytest.mark.parametrize("fmt", ["int4:g32", "int8:channel", "iq4nl:g32", "uint3:g32:min=fp16"])
def test_the_errors_are_those_of_what_is_returned_and_only_fall(fmt: str) -> None:
    weight, stats = problem(40, 128)
    form = parse_format(fmt)
    factor = factorize(stats, 0.01, columns_in_order(stats.second_moment.diagonal(), 1, 32))
    scale, offset = fit_blocks(weight, form, Call("search"), stats.importance)
    q = empty(form, (40, 128), scale, offset)
    before = None
    for rounds in (0, 1, 2, 5):
        new, start, error = CoreSteps().solve(q, weight, factor, None, None, rounds)
        off = new.dequantize().double() - weight.double()
        torch.testing.assert_close(error, ((off @ factor.hessian.double()) * off).sum(1), rtol=1e-4, atol=0)
        assert bool((error <= start).all()) and (before is None or bool((error <= before * (1 + 1e-6)).all()))
        before = error


def test_what_does_not_fit_is_refused() -> None:
    levels, none = module.GridLevels((-8, 7)), module.Offsets.none

    def call(rows: int = 4, cols: int = 32, group: int = 16, **changed: Any) -> None:
        given = {
            "target": torch.zeros(rows, cols), "scale": torch.ones(rows, 2), "offset": None, "hessian": torch.eye(cols),
            "order": torch.arange(cols, dtype=torch.int32), "still": None, "codes": torch.zeros(rows, cols, dtype=torch.uint8),
            "error": torch.zeros(rows, dtype=torch.float64), "rounds": 1, "refit": True,
        } | changed  # fmt: skip
        arrays = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in given.items()}
        module.solve(module.ThreadPool(1), "", changed.pop("levels", levels), none, group, **arrays)

    call()
    for wrong in (
        {"scale": torch.ones(4, 3)}, {"offset": torch.ones(4, 2)}, {"hessian": torch.eye(31)}, {"group": 0}, {"rounds": -1},
        {"order": torch.zeros(32, dtype=torch.int32)}, {"order": torch.arange(1, 33, dtype=torch.int32)}, {"scale_store": "e8m0"},
        {"codes": torch.zeros(4, 31, dtype=torch.uint8)}, {"error": torch.zeros(3, dtype=torch.float64)},
        {"still": torch.zeros(3, 32, dtype=torch.uint8)}, {"feed": (torch.eye(16).numpy(), None, torch.zeros(4).double().numpy())},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            call(**wrong)
