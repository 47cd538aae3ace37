"""Gradients of rounding, held against the formulas of the papers as loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lowbit
from lowbit.formats import InputQuantizer, parse_format
from lowbit.formats.inputs import parse_inputs
from lowbit.interchange.tensors import TensorPlan
from lowbit.recipes.recipe import Recipe
from lowbit.training.input_quantizer import TrainedInputs
from lowbit.training.learned_step import block_sizes, highest, unit
from lowbit.training.weight_quantizer import Kept, Recomputed

FORMATS = [
    "int4:g4:s=fp32", "int2:channel", "int8:tensor", "uint4:g4:min=fp32:s=fp32", "uint3:g4:zero=fp32:s=fp32",
    "uint4:g4:asym:s=fp32", "nf4:g4:s=fp32", "fp4:g4:s=fp32", "e4m3:channel", "ternary:tensor", "binary:channel", "int3:2x3",
]  # fmt: skip


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept_of(weight: Tensor, text: str, learned: bool = True, shrink: float = 0.7) -> Kept:
    """A quantizer whose ranges are so short that some weights are clipped."""
    kept = Kept(lowbit.quantize_tensor(weight, text), learned)
    with torch.no_grad():
        kept.range.mul_(shrink)
    return kept


def loops(weight: Tensor, grad: Tensor, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dw, dL/ds and dL/dm of every block, element by element: LSQ equations 3 and 5, LSQ+ for the minimum."""
    q = kept.quantize(weight)
    fmt, (rows, cols) = q.format, weight.shape
    high = rows if fmt.block.rows == -1 else fmt.block.rows
    wide = cols if fmt.block.cols == -1 else fmt.block.cols
    scales, offsets = q.scales().double(), q.offsets()
    levels = sorted(v for v in fmt.grid.levels.double().tolist() if math.isfinite(v))
    of_w = torch.zeros(weight.shape, dtype=torch.float64)
    of_s, of_m = torch.zeros_like(scales), torch.zeros_like(scales)
    for i in range(rows):
        for j in range(cols):
            at = 0, i // high, j // wide
            s, w, g = float(scales[at]), float(weight[i, j]), float(grad[i, j])
            o = 0.0 if offsets is None else float(offsets[at])
            minimum = fmt.offset_kind == "min"
            v = (w - o) / s if minimum else w / s
            position = v if minimum else v + o
            level = min(levels, key=lambda x, p=position: abs(x - p))
            shift = 0.0 if minimum else o
            if fmt.grid.lo <= position <= fmt.grid.hi:
                of_w[i, j] = g
                of_s[at] += g * (level - shift - v)
            else:
                of_s[at] += g * (level - shift)
                of_m[at] += g
    return of_w, of_s, of_m


def close(found: Tensor, wanted: Tensor) -> bool:
    return float((found.double() - wanted).norm()) <= 1e-5 * float(wanted.norm()) + 1e-9


@pytest.mark.parametrize("text", FORMATS)
def test_gradients_are_those_of_loops_in_float64(text: str) -> None:
    weight, grad = draw((4, 10)).requires_grad_(), draw((4, 10), 1)
    kept = kept_of(weight.detach(), text)
    dense = kept(weight)
    assert torch.equal(dense, kept.quantize(weight).dequantize())
    dense.backward(grad)
    of_w, of_s, of_m = loops(weight.detach(), grad, kept)
    assert 0 < int((of_w == 0).sum()) < weight.numel() or text == "binary:channel"
    assert torch.equal(weight.grad.double(), of_w)
    gains = (torch.as_tensor(block_sizes(kept.format.block, (4, 10))) * highest(kept.format)).double() ** -0.5
    assert close(kept.range.grad, of_s * gains)
    if kept.format.offset_kind == "min":
        assert close(kept.minimum.grad, of_m * gains) and bool(of_m.any())


def test_gradient_descent_moves_the_end_of_the_range_by_the_gradient_of_the_step() -> None:
    weight, grad, rate = draw((4, 10)), draw((4, 10), 1), 1e-3
    kept = kept_of(weight, "int4:g4:s=fp32")
    before = kept.quantize(weight).scales().double()
    _, of_s, _ = loops(weight, grad, kept)
    optimizer = torch.optim.SGD(kept.parameters(), lr=rate)
    kept(weight).backward(grad)
    optimizer.step()
    sizes = torch.tensor([4.0, 4.0, 2.0]).double()
    assert close(kept.quantize(weight).scales() - before, -rate * of_s / (sizes * 8).sqrt() / 8)


def test_the_change_of_a_step_is_foreseen_by_its_gradient_where_all_is_clipped() -> None:
    """There the rounded weight is a smooth function of the step, so that differences tell its slope."""
    weight = draw((3, 8)).sign() * 5
    kept = kept_of(weight, "int4:g4:s=fp32", shrink=0.2)
    kept(weight).sum().backward()
    gain = (4 * 8) ** -0.5 / unit(kept.format)  # of `range` in place of the step
    for at in ((0, 0, 0), (0, 1, 1), (0, 2, 0)):
        ends = []
        for change in (1e-2, -1e-2):
            with torch.no_grad():
                kept.range[at] += change
                ends.append(float(kept.quantize(weight).dequantize().double().sum()))
                kept.range[at] -= change
        assert (ends[0] - ends[1]) / 2e-2 * gain == pytest.approx(float(kept.range.grad[at]), rel=1e-3)


def test_levels_of_a_codebook_get_the_gradients_of_their_weights() -> None:
    weight, grad = draw((3, 20)).requires_grad_(), draw((3, 20), 1)
    kept = Kept(lowbit.quantize_tensor(weight.detach(), "kmeans2:channel"), True)
    q = kept.quantize(weight)
    kept(weight).backward(grad)
    wanted = torch.zeros(1, 3, 1, 4, dtype=torch.float64)
    for i, row in enumerate(q.unpacked().tolist()):
        for j, code in enumerate(row):
            wanted[0, i, 0, code] += float(grad[i, j])
    assert close(kept.levels.grad, wanted * (20 / 4) ** -0.5) and torch.equal(weight.grad, grad)


def test_levels_and_scales_of_a_shared_codebook_both_learn() -> None:
    weight, grad = draw((3, 20)).requires_grad_(), draw((3, 20), 1)
    kept = kept_of(weight.detach(), "kmeans2:g10:cb=tensor:s=fp32", shrink=1.0)
    q = kept.quantize(weight)
    kept(weight).backward(grad)
    scales, levels, codes = q.scales()[0].double(), q.codebooks()[0, 0, 0].double(), q.unpacked().tolist()
    of_level, of_scale = torch.zeros(4, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    for i in range(3):
        for j in range(20):
            s, level, g = float(scales[i, j // 10]), float(levels[codes[i][j]]), float(grad[i, j])
            v = float(weight.detach()[i, j]) / s
            inside = float(levels.min()) <= v <= float(levels.max())
            of_level[codes[i][j]] += g * s
            of_scale[i, j // 10] += g * (level - (v if inside else 0))
    assert close(kept.levels.grad[0, 0, 0], of_level * (60 / 4) ** -0.5)
    assert close(kept.range.grad[0], of_scale * 10**-0.5)


def test_recomputed_scales_pass_gradients_straight_through() -> None:
    weight, grad = draw((16, 32)).requires_grad_(), draw((16, 32), 1)
    recipe = Recipe.parse("absmean@ternary:tensor")
    plan = TensorPlan("w", (16, 32), "linear", torch.float32, format=recipe.format)
    dense = Recomputed(plan, recipe)(weight)
    dense.backward(grad)
    assert torch.equal(weight.grad, grad)
    mean = weight.detach().abs().mean()
    wanted = (weight.detach() / mean).round().clamp(-1, 1) * mean  # BitNet b1.58, equations 1 to 3
    assert torch.allclose(dense, wanted, rtol=1e-5)


def test_fixed_scales_are_no_parameters_and_clip() -> None:
    weight = draw((4, 10)).requires_grad_()
    kept = kept_of(weight.detach(), "int4:g4:s=fp32", learned=False)
    assert not list(kept.parameters()) and set(dict(kept.named_buffers())) == {"range"}
    kept(weight).sum().backward()
    of_w, _, _ = loops(weight.detach(), torch.ones(4, 10), kept)
    assert torch.equal(weight.grad.double(), of_w)


def test_a_nested_scale_learns_its_own_scale() -> None:
    weight = draw((8, 64)).requires_grad_()
    kept = kept_of(weight.detach(), "int4:g8:s=(int6:g16)", shrink=1.0)
    assert set(dict(kept.named_parameters())) == {"range", "scale.range"}
    kept(weight).backward(draw((8, 64), 1))
    assert all(bool(p.grad.any()) for p in kept.parameters())


@pytest.mark.parametrize("ranges", ["lsq", "pact"])
@pytest.mark.parametrize(
    "text", ["int8:tensor:static", "int4:*x4:static", "uint4:tensor:asym:static", "int4:tensor:static:divisor"]
)
def test_ranges_of_inputs_learn_as_the_papers_say(text: str, ranges: str) -> None:
    inputs, x, grad = parse_inputs(text), draw((2, 3, 8)).requires_grad_(), draw((2, 3, 8), 1)
    parts = {name: torch.full(size, 0.1) for name, (_, size) in inputs.parts(8).items()}
    parts |= {"input_offset": torch.full((1, 1), 7.0)} if "input_offset" in parts else {}
    if inputs.divisor:
        parts["input_divisor"] = torch.linspace(0.5, 2, 8)
    top = inputs.format.grid.hi
    parts["input_scale"] = parts["input_scale"] * 7 / top
    quantizer = TrainedInputs(inputs, 8, parts, ranges)  # type: ignore[arg-type]
    y = quantizer(x)
    assert torch.equal(y, InputQuantizer.of(inputs, 8, parts).round(x))
    y.backward(grad)
    values = x.detach()
    grid, scale = inputs.format.grid, parts["input_scale"].double()
    offset = float(parts["input_offset"]) if "input_offset" in parts else 0.0
    of_x, of_s = torch.zeros(2, 3, 8, dtype=torch.float64), torch.zeros_like(scale)
    wide = 8 // scale.shape[1]
    for a in range(2):
        for b in range(3):
            for c in range(8):
                d = float(parts["input_divisor"][c]) if inputs.divisor else 1.0
                s, g = float(scale[0, c // wide]), float(grad[a, b, c])
                v = float(values[a, b, c]) / d / s
                level = min(max(round(v + offset), grid.lo), grid.hi) - offset
                if grid.lo <= v + offset <= grid.hi:
                    of_x[a, b, c] = g / d
                    of_s[0, c // wide] += g * (level - v) if ranges == "lsq" else 0
                else:
                    of_s[0, c // wide] += g * level
    assert close(x.grad, of_x) and int((of_x == 0).sum()) > 0
    assert close(quantizer.range.grad, of_s * (wide * highest(inputs.format)) ** -0.5)


def test_columns_of_outliers_stay_float_and_learn_nothing() -> None:
    inputs, x = parse_inputs("int8:tensor:static:outliers=2"), draw((6, 8)).clamp(-1.5, 1.5)
    x[:, 3] = 5.0
    x.requires_grad_()
    quantizer = TrainedInputs(inputs, 8, {"input_scale": torch.full((1, 1), 0.02)}, "lsq")
    y = quantizer(x)
    grad = torch.zeros(6, 8)
    grad[:, 3] = 1
    y.backward(grad)
    assert torch.equal(y[:, 3], x[:, 3]) and torch.equal(x.grad, grad) and not bool(quantizer.range.grad.any())


def test_casting_a_model_leaves_scales_in_float32() -> None:
    kept = Kept(lowbit.quantize_tensor(draw((8, 32)), "int4:g32"), True).to(torch.bfloat16)
    assert kept.range.dtype is torch.float32
    weight = draw((8, 32)).to(torch.bfloat16).requires_grad_()
    dense = kept(weight)
    dense.sum().backward()
    assert dense.dtype is weight.grad.dtype is torch.bfloat16


def test_units_are_powers_of_two_near_the_end_of_the_grid() -> None:
    for text, wanted in {
        "int4": 1 / 8,
        "int8": 1 / 128,
        "ternary": 1.0,
        "nf4": 1.0,
        "uint4:asym": 1 / 16,
        "fp8": 1 / 512,
    }.items():
        assert unit(parse_format(text)) == wanted


@pytest.mark.parametrize("text", ["int8:channel", "int4:g32", "int2:g32", "binary:channel"])
def test_gradients_of_scales_do_not_rule_the_norm_of_all(text: str) -> None:
    """Trainer clips gradients by their norm over all parameters, which a few large ones would leave to nobody else."""
    weight = draw((64, 64)).requires_grad_()
    kept = kept_of(weight.detach(), text, shrink=1.0)
    kept(weight).backward(draw((64, 64), 1))
    assert float(kept.range.grad.norm()) < float(weight.grad.norm())
