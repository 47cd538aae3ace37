"""GPTQ and its descendants against naive loops in float64, brute force, and their own promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.formats import QTensor, parse_format
from lowbit.solvers import Call
from lowbit.solvers.coordinate_descent import coordinate_descent, feed_errors
from lowbit.solvers.feedback import columns_in_order
from lowbit.solvers.hessian import factorize, quadratic
from lowbit.solvers.methods.qronos import corrected
from lowbit.solvers.refit import refit_scales
from lowbit.solvers.rounding import Rounder, empty, with_values
from lowbit.solvers.stats import Stats, StatsBuilder

FORMATS = (
    "int4:g32", "int4:g32:asym", "uint4:g32:min=fp16", "iq4nl:g32", "nf4:g64", "int3:channel", "int4:tensor", "mxfp4",
    "nvfp4", "uint3:g32:s=(uint6:g8):min=(int6:g8)", "int4:16x16", "ternary:g128", "e4m3:channel", "int4:g50",
)  # fmt: skip


def problem(rows: int = 60, cols: int = 100, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor, Stats]:
    """Weights, correlated inputs with a few strong channels, and their statistics."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    mixing = torch.randn(cols, cols, generator=generator) * torch.rand(cols, generator=generator).square() * 2
    inputs = torch.randn(tokens, cols, generator=generator) @ mixing
    builder = StatsBuilder(cols)
    builder.add(inputs)
    return weight, inputs, builder.stats()


def output_error(q: QTensor, weight: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (q.dequantize() - weight).T).norm() / (inputs @ weight.T).norm())


def solved(method: str, weight: Tensor, fmt: str, stats: Stats | None, **options: float) -> QTensor:
    return Call(method, tuple(options.items()))(weight, parse_format(fmt), Call("search"), stats)


@pytest.mark.parametrize("fmt", FORMATS)
def test_feedback_lowers_the_error_of_the_output_for_every_format(fmt: str) -> None:
    weight, inputs, stats = problem()
    nearest = output_error(solved("rtn", weight, fmt, stats), weight, inputs)
    plain = output_error(solved("gptq", weight, fmt, stats, polish=0), weight, inputs)
    polished = output_error(solved("gptq", weight, fmt, stats), weight, inputs)
    assert plain < 0.85 * nearest and polished <= plain * 1.001, (nearest, plain, polished)


def naive_gptq(weight: Tensor, hessian: Tensor, rounder: Rounder) -> Tensor:
    """Optimal brain quantization in a fixed order, by its definition: after each column the rest is re-optimised with
    the inverse of what is left of H (Frantar et al. 2022, equations 2 and 3), float64."""
    w, h = weight.double().clone(), hessian.double()
    out = torch.empty_like(w)
    for k in range(w.shape[1]):
        inverse = torch.linalg.inv(h[k:, k:])
        out[:, k] = rounder.value(k, w[:, k].float()).double()
        error = (w[:, k] - out[:, k]) / inverse[0, 0]
        w[:, k:] -= error[:, None] * inverse[0]
    return out


@pytest.mark.parametrize("cols", [40, 128, 200])
def test_the_blocked_loop_is_the_definition(cols: int) -> None:
    weight, _, stats = problem(12, cols, 3 * cols)
    fmt = parse_format("int3:g32")
    start = solved("rtn", weight, "int3:g32", stats)
    factor = factorize(stats, 0.01, torch.arange(cols))
    q = empty(fmt, (12, cols), start.scales(), None)
    rounder = Rounder(q)
    found = feed_errors(weight, factor.upper, rounder)
    expected = naive_gptq(weight, factor.hessian, rounder)
    # A value on the edge between two levels may fall either way in float32; nearly all are the same.
    assert (found - expected).abs().gt(1e-4).float().mean() < 0.01
    best = quadratic(expected.float() - weight, factor.hessian)
    assert quadratic(found - weight, factor.hessian) == pytest.approx(best, rel=0.02)


def test_any_order_of_columns_gives_codes_in_the_columns_own_places() -> None:
    weight, inputs, stats = problem()
    for order in (0, 1, 2):
        q = solved("gptq", weight, "int4:g32", stats, order=order, polish=0)
        assert output_error(q, weight, inputs) < 0.8 * output_error(
            solved("rtn", weight, "int4:g32", stats), weight, inputs
        )
    diagonal = torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0, 4.0])
    assert columns_in_order(diagonal, 1, 3).tolist() == [3, 1, 5, 4, 2, 0]
    assert columns_in_order(diagonal, 2, 3).tolist() == [3, 5, 4, 1, 2, 0]
    with pytest.raises(RecipeError, match="order=3 is unknown"):
        solved("gptq", weight, "int4:g32", stats, order=3)


def test_gptaq_is_the_definition() -> None:
    """W[:, i:] -= e U[i, i:] - w_i P[i, i:], one column at a time, beside the blocked loop."""
    weight, _, stats = problem(8, 150, 500)
    generator = torch.Generator().manual_seed(1)
    shift = torch.randn(150, 150, generator=generator).triu(1) * 0.01
    factor = factorize(stats, 0.01, torch.arange(150))
    rounder = Rounder(
        empty(parse_format("int4:g32"), (8, 150), solved("rtn", weight, "int4:g32", stats).scales(), None)
    )
    w, expected = weight.clone(), torch.empty_like(weight)
    for k in range(150):
        now = w[:, k].clone()
        expected[:, k] = rounder.value(k, now)
        w[:, k + 1 :] -= ((now - expected[:, k]) / factor.upper[k, k])[:, None] * factor.upper[k, k + 1 :]
        w[:, k + 1 :] += now[:, None] * shift[k, k + 1 :]
    found = feed_errors(weight, factor.upper, rounder, shift)
    assert (found - expected).abs().gt(1e-4).float().mean() < 0.02


def test_a_sweep_of_coordinate_descent_never_raises_the_error_and_ends_where_no_single_change_helps() -> None:
    weight, _, stats = problem(6, 24, 100)
    fmt = parse_format("int3:g8")
    q = solved("rtn", weight, "int3:g8", stats)
    hessian = stats.second_moment + 0.01 * torch.eye(24) * stats.second_moment.diagonal().mean()
    rounder, values = Rounder(q), q.dequantize()
    errors = [quadratic(values - weight, hessian)]
    for _ in range(20):
        values, error = coordinate_descent(values, weight, hessian, rounder)
        errors.append(quadratic(values - weight, hessian))
        assert float(error.sum()) == pytest.approx(errors[-1], rel=1e-4)
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors)) and errors[-1] < 0.85 * errors[0]
    levels = fmt.grid.levels
    for row, col in itertools.product(range(6), range(24)):
        for level in levels:
            other = values.clone()
            other[row, col] = level * q.scales()[0, row, col // 8]
            assert quadratic(other - weight, hessian) >= errors[-1] * (1 - 1e-4)


@pytest.mark.parametrize("fmt", ["int4:g8", "uint3:g8:min=fp32", "int4:g8:asym", "iq4nl:channel"])
def test_refitted_scales_are_the_least_squares_answer(fmt: str) -> None:
    """Against numpy-style least squares on the inputs themselves, in float64, one row at a time."""
    form = parse_format(f"{fmt}:s=fp32")
    weight, inputs, stats = problem(5, 24, 200)
    q = Call("rtn")(weight, form, Call("search"), stats)
    new = refit_scales(q, weight, stats.second_moment)
    level = form.grid.decode(q.unpacked()).double()
    if form.offset is not None and form.offset_kind != "min":
        size = 24 if form.block.cols == -1 else form.block.cols
        level = level - q.offsets()[0].double().repeat_interleave(size, 1)
    size = 24 if form.block.cols == -1 else form.block.cols
    x = inputs.double()
    for row in range(5):
        columns = []
        for basis in [level[row], torch.ones(24, dtype=torch.float64)][: 2 if form.offset_kind == "min" else 1]:
            for begin in range(0, 24, size):
                part = torch.zeros(24, dtype=torch.float64)
                part[begin : begin + size] = basis[begin : begin + size]
                columns.append(x @ part)
        design = torch.stack(columns, 1)
        target = x @ weight[row].double()
        best = design @ torch.linalg.lstsq(design, target[:, None]).solution[:, 0]
        found = x @ new.dequantize()[row].double()
        assert (found - target).norm() <= (best - target).norm() * 1.02 + 1e-6
    assert output_error(new, weight, inputs) <= output_error(q, weight, inputs) * 1.0001
    same = (new.unpacked() == q.unpacked()).float().mean()
    assert same > 0.999  # codes stay


def test_qronos_minimises_the_distance_to_the_float_models_output() -> None:
    weight, inputs, _ = problem(30, 64, 600)
    generator = torch.Generator().manual_seed(3)
    seen = inputs + 0.3 * inputs.std() * torch.randn(inputs.shape, generator=generator)
    seen = seen * torch.linspace(0.8, 1.2, 64)  # what earlier layers did is no pure noise
    builder = StatsBuilder(64, drift=True)
    builder.add(seen, inputs)
    stats = builder.stats()

    def distance(w: Tensor) -> float:
        return float((seen @ w.T - inputs @ weight.T).norm() / (inputs @ weight.T).norm())

    best = torch.linalg.lstsq(seen.double(), inputs.double() @ weight.double().T).solution.T.float()
    full = corrected(weight, stats, 1.0, 1e-6)
    assert distance(full) == pytest.approx(distance(best), rel=1e-3) and distance(full) < 0.9 * distance(weight)
    assert torch.equal(corrected(weight, stats, 0.0, 0.01), weight)
    gptq = solved("gptq", weight, "int4:g32", stats)
    qronos = solved("qronos", weight, "int4:g32", stats, blend=1.0, ridge=0.001)
    gptaq = solved("gptaq", weight, "int4:g32", stats, alpha=1.0)
    assert distance(qronos.dequantize()) < 0.9 * distance(gptq.dequantize())
    assert distance(gptaq.dequantize()) < 0.97 * distance(
        solved("gptq", weight, "int4:g32", stats, polish=0).dequantize()
    )


def test_damping_grows_until_a_singular_matrix_can_be_factorized() -> None:
    weight, _, _ = problem(8, 64, 10)
    builder = StatsBuilder(64)
    builder.add(torch.ones(3, 64))  # rank one
    stats = builder.stats()
    found = Call("gptq", (("damp", 0.0),)).solve(weight, parse_format("int4:g32"), Call("search"), stats)
    assert found.trace is not None and found.trace.damp > 0 and bool(found.weight.dequantize().isfinite().all())
    empty_stats = StatsBuilder(64).stats()
    nothing = solved("gptq", weight, "int4:g32", empty_stats, polish=0)
    assert (nothing.dequantize() - weight).norm() < 0.15 * weight.norm()


def test_channels_that_were_always_zero_round_to_nearest() -> None:
    weight, inputs, _ = problem(16, 64, 300)
    inputs = inputs.clone()
    inputs[:, 10:20] = 0
    builder = StatsBuilder(64)
    builder.add(inputs)
    q = Call("gptq", (("polish", 0),))(weight, parse_format("int8:channel"), Call("absmax"), builder.stats())
    step = q.scales()[0]
    assert bool(((q.dequantize() - weight)[:, 10:20].abs() <= 0.51 * step.abs() + 1e-6).all())


def test_the_trace_tells_round_to_nearest_from_the_result() -> None:
    weight, _, stats = problem()
    trace = Call("gptq").solve(weight, parse_format("int4:g32"), Call("search"), stats).trace
    assert trace is not None and 0 < trace.end < trace.start and trace.damp == 0.01


def test_statistics_are_means_over_tokens_and_scale_by_algebra() -> None:
    _, inputs, stats = problem(4, 20, 300)
    x = inputs.double()
    assert torch.allclose(stats.second_moment.double(), x.T @ x / 300, rtol=1e-4, atol=1e-4)
    assert torch.allclose(stats.absmax, inputs.abs().amax(0)) and stats.tokens == 300
    scale = torch.linspace(0.5, 3, 20)
    builder = StatsBuilder(20)
    for part in (inputs / scale).split(70):
        builder.add(part.view(1, *part.shape))
    direct, algebra = builder.stats(), stats.scaled(scale)
    assert torch.allclose(direct.second_moment, algebra.second_moment, rtol=1e-3, atol=1e-4)
    assert torch.allclose(direct.mean_abs, algebra.mean_abs, rtol=1e-4)


def test_values_on_the_grid_come_back_as_the_same_values() -> None:
    weight, _, stats = problem()
    for fmt in FORMATS:
        q = solved("rtn", weight, fmt, stats)
        again = with_values(q, q.dequantize())
        assert torch.equal(again.dequantize(), q.dequantize()), fmt
