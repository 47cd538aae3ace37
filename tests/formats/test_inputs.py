"""Quantized inputs against naive loops over blocks, and against tensors that were quantized and stored."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import Block, Format, InputQuantizer, Inputs, Offset, encode, parse_format, parse_grid, parse_inputs
from lowbit.formats.inputs import outlier_columns, quantize_inputs, range_to_scale, round_inputs
from strategies import normal, steady

DYNAMIC = [
    "int8:token", "int8:tensor", "int8:g8", "int8:g7", "int8:2x8", "int8:*x8", "int4:token:narrow", "uint8:token:asym",
    "uint8:g8:asym", "uint8:tensor:asym", "uint8:token:zero=fp32", "int8:token:zero=int32", "uint4:g5:min=fp32",
    "fp8:token", "fp8:g8", "mxfp8", "int8:g8:s=e4m3",
]  # fmt: skip


@st.composite
def inputs(draw: st.DrawFn) -> Inputs:
    """Any inputs that are allowed."""
    if draw(st.integers(0, 9)) == 0:
        return Inputs(None, divisor=True)
    static, outliers = draw(st.booleans()), draw(st.none() | st.floats(1e-3, 1e4))
    rows = -1 if static else draw(st.sampled_from([1, -1, 2]))
    grid = draw(st.sampled_from(["int8", "int4", "uint8", "uint3", "e4m3", "e5m2", "ternary"]))
    offsets = [None, Offset("zero", "grid"), Offset("zero", "int32"), Offset("float", "fp32"), Offset("min", "fp16")]
    offset = draw(st.sampled_from(offsets[grid.startswith("uint") :])) if "int" in grid else None
    scale = draw(st.sampled_from(["fp32", "fp16", "e8m0", "e4m3"]))
    fmt = Format(parse_grid(grid), Block(rows, draw(st.sampled_from([-1, 1, 32]))), scale, offset)
    return Inputs(fmt, static, draw(st.booleans()), outliers)


@steady(300)
@given(inputs())
def test_the_text_round_trips(value: Inputs) -> None:
    assert parse_inputs(str(value)) == value and hash(parse_inputs(str(value))) == hash(value)


def test_how_it_is_written() -> None:
    forms = {
        "int8": "int8:token", "int8:channel": "int8:token", "int8:g128": "int8:g128", "int8:g64:s=fp32": "int8:g64",
        "divisor:int8:outliers=6.0": "int8:token:outliers=6:divisor", "int8:static:tensor": "int8:tensor:static",
        "fp8": "e4m3:token", "mxfp8": "mxfp8", "float:divisor": "float:divisor", "uint8:token:asym": "uint8:token:asym",
    }  # fmt: skip
    assert {text: str(parse_inputs(text)) for text in forms} == forms


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int8:token:static", "int8:tensor:static"),
        ("int8:g64:static", "static scale serves all tokens"),
        ("uint8:token", "add ':asym'"),
        ("kmeans4", "are learned"),
        ("nvfp4", "nested ones of nvfp4"),
        ("int8:token:statc", "did you mean 'static'"),
        ("int8:outliers=x", "is no number"),
        ("int8:outliers=0", "is no magnitude"),
        ("int8:outliers=nan", "is no magnitude"),
        ("int8:tensor:static:static", "twice"),
        ("int8:outliers=6:outliers=7", "twice"),
        ("float", "divisor"),
        ("float:outliers=6", "divisor"),
        ("", "unknown grid"),
    ],
)
def test_what_cannot_be_is_an_error(text: str, words: str) -> None:
    with pytest.raises(FormatError, match=words.replace("(", r"\(")):
        parse_inputs(text)


def naive(x: Tensor, value: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """What x [tokens, channels] rounds to, one block after the other in Python; with scale and offset by element."""
    fmt = value.format
    assert fmt is not None
    rows, cols = (n if size == -1 else size for n, size in zip(x.shape, (fmt.block.rows, fmt.block.cols)))
    found, scales, offsets = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    for r, c in itertools.product(range(0, x.shape[0], rows), range(0, x.shape[1], cols)):
        at = slice(r, r + rows), slice(c, c + cols)
        block = x[at]
        scale, offset = range_to_scale(block.min(), block.max(), fmt)
        z = torch.tensor(0.0) if offset is None else offset
        level = fmt.grid.round(block * (1 / scale if scale else 0.0) + z)
        found[at], scales[at], offsets[at] = scale * (level - z), scale, z
    return found, scales, offsets


@pytest.mark.parametrize("text", DYNAMIC)
def test_dynamic_rounding_is_a_loop_over_blocks(text: str) -> None:
    value = parse_inputs(text)
    for shape in [(5, 40), (2, 3, 40), (1, 7), (40,), (3, 24)]:
        x = normal(shape, 3, 2.0)
        expected, scales, offsets = naive(x.view(-1, shape[-1]), value)
        found = round_inputs(x, value)
        assert found.shape == x.shape and torch.equal(found.view(expected.shape), expected), (text, shape)
        level, scale, offset = quantize_inputs(x, value)
        assert level.shape == x.shape and scale.dtype == torch.float32
        back = scales.view(x.shape) * (level.float() - offsets.view(x.shape))
        assert torch.equal(back, found) and (offset is None) == (value.format.offset is None)
        again = quantize_inputs(x, value, scale, offset)  # given what it found, it finds the same
        assert torch.equal(again[0], level)


@pytest.mark.parametrize("text", [t for t in DYNAMIC if "min=" not in t])
def test_it_is_what_a_stored_tensor_would_hold(text: str) -> None:
    """The codes of a QTensor with these scales, over the regions of formats.blocks."""
    value, x = parse_inputs(text), normal((6, 40), 4)
    fmt = value.format
    level, scale, offset = quantize_inputs(x, value)
    q = encode(x, fmt, scale[None], None if offset is None else offset[None])
    assert torch.equal(q.dequantize(), round_inputs(x, value))
    assert torch.equal(fmt.grid.decode(q.unpacked()), level.float())


@pytest.mark.parametrize(("text", "dtype"), [("int8:token", torch.int8), ("uint8:token:asym", torch.uint8),
                                             ("fp8:token", torch.float32), ("int4:token", torch.int8)])  # fmt: skip
def test_levels_have_the_type_of_their_grid(text: str, dtype: torch.dtype) -> None:
    assert quantize_inputs(normal((3, 8), 1), parse_inputs(text))[0].dtype == dtype


@pytest.mark.parametrize("text", ["int8:token", "int8:g8", "int8:tensor", "uint8:token:asym", "uint8:g8:zero=fp32"])
def test_rounding_errs_by_half_a_step(text: str) -> None:
    value, x = parse_inputs(text), normal((7, 64), 5)
    _, scales, _ = naive(x, value)
    limit = 1.0 if "asym" in text else 0.5  # a rounded zero-point shifts the range by half a step
    assert bool(((round_inputs(x, value) - x).abs() <= limit * scales * (1 + 1e-5)).all())


def test_one_token_does_not_touch_another_unless_they_share_a_scale() -> None:
    x = normal((4, 32), 6)
    other = x.clone()
    other[2] *= 100
    for text, alone in [("int8:token", True), ("int8:g8", True), ("int8:tensor", False)]:
        a, b = (round_inputs(v, parse_inputs(text))[[0, 1, 3]] for v in (x, other))
        assert torch.equal(a, b) == alone


def test_outlier_columns_stay_float_and_widen_no_range() -> None:
    value, x = parse_inputs("int8:token:outliers=6"), normal((9, 32), 7).clamp(-5, 5)
    plain = round_inputs(x, parse_inputs("int8:token"))
    assert torch.equal(round_inputs(x, value), plain)
    x[4, 3], x[0, 11], x[8, 20] = 80.0, -6.0, 5.999
    hot = torch.zeros(32, dtype=torch.bool)
    hot[[3, 11]] = True
    assert torch.equal(outlier_columns(x, 6.0), hot)
    found, rest = round_inputs(x, value), x.masked_fill(hot, 0)
    assert torch.equal(found[:, hot], x[:, hot])
    assert torch.equal(found[:, ~hot], round_inputs(rest, parse_inputs("int8:token"))[:, ~hot])
    level, scale, _ = quantize_inputs(x, value)
    assert not level[:, hot].any() and torch.equal(scale[:, 0], rest.abs().amax(1) / 127)
    both = round_inputs(torch.where(hot, x, 0.0)[:, :0], value)  # no channels at all
    assert both.shape == (9, 0)


def test_static_scales_are_used_and_clip() -> None:
    value, x = parse_inputs("int8:tensor:static"), torch.tensor([[0.0, 1.26, -1.26, 5.0, -50.0, 0.04]])
    scale = torch.tensor([[0.1]])
    expected = torch.tensor([[0.0, 1.3, -1.3, 5.0, -12.8, 0.0]])
    assert torch.allclose(round_inputs(x, value, scale), expected, atol=1e-6)
    with pytest.raises(FormatError, match="calibrate the model first"):
        round_inputs(x, value)
    shifted = parse_inputs("uint8:tensor:asym:static")
    found = round_inputs(x, shifted, scale, torch.tensor([[20.0]]))
    assert torch.allclose(found, torch.tensor([[0.0, 1.3, -1.3, 5.0, -2.0, 0.0]]), atol=1e-6)
    by_columns = parse_inputs("int8:*x3:static")
    assert torch.allclose(
        round_inputs(x, by_columns, torch.tensor([[0.1, 1.0]])), torch.tensor([[0.0, 1.3, -1.3, 5.0, -50.0, 0.0]])
    )


def test_zeros_and_constants_come_back() -> None:
    for text in DYNAMIC:
        assert not round_inputs(torch.zeros(3, 16), parse_inputs(text)).any()
    for text in (
        "int8:token",
        "uint8:token:asym",
        "uint8:token:zero=fp32",
        "int8:token:zero=int32",
        "uint8:g8:min=fp32",
    ):
        for c in (3.0, -0.7, 1e-20):
            x = torch.full((2, 16), c)
            assert torch.allclose(round_inputs(x, parse_inputs(text)), x, rtol=1e-5, atol=0)


@pytest.mark.parametrize("text", ["int8:token", "uint8:token:asym", "int8:g8", "int8:token:outliers=6"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_pass_for_a_number(text: str, bad: float) -> None:
    x = normal((3, 16), 8)
    x[1, 2] = bad
    found = round_inputs(x, parse_inputs(text))
    assert not bool(found[1].isfinite().all()) and bool(found[[0, 2]].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_type_stays_and_computing_is_in_float32(dtype: torch.dtype) -> None:
    x = normal((4, 32), 9).to(dtype)
    for text in ("int8:token", "int8:token:outliers=2", "fp8:g8"):
        found = round_inputs(x, parse_inputs(text))
        assert found.dtype == dtype and torch.equal(found, round_inputs(x.float(), parse_inputs(text)).to(dtype))


@pytest.mark.parametrize("text", DYNAMIC)
def test_no_tokens(text: str) -> None:
    for shape in [(0, 16), (2, 0, 16)]:
        x = torch.zeros(shape)
        assert round_inputs(x, parse_inputs(text)).shape == shape
        assert quantize_inputs(x, parse_inputs(text))[0].shape == shape


def test_what_is_stored() -> None:
    f32 = torch.float32
    assert parse_inputs("int8:token").parts(40) == {}
    assert parse_inputs("int8:tensor:static").parts(40) == {"input_scale": (f32, (1, 1))}
    assert parse_inputs("uint8:*x16:asym:static:divisor").parts(40) == {
        "input_scale": (f32, (1, 3)), "input_offset": (f32, (1, 3)), "input_divisor": (f32, (40,)),
    }  # fmt: skip


def test_a_quantizer_divides_then_rounds() -> None:
    x, d = normal((5, 32), 10), torch.linspace(0.5, 4, 32)
    value = parse_inputs("int8:token:divisor")
    quantizer = InputQuantizer.of(value, 32, {"input_divisor": d})
    assert torch.equal(quantizer.round(x), round_inputs(x / d, parse_inputs("int8:token")))
    only = InputQuantizer.of(parse_inputs("float:divisor"), 32, {"input_divisor": d})
    assert torch.equal(only.round(x), x / d) and only.round(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(FormatError, match="input_divisor"):
        InputQuantizer.of(value, 32, {})
    with pytest.raises(FormatError, match="width 31"):
        InputQuantizer.of(value, 31, {"input_divisor": d})
    with pytest.raises(FormatError, match="no levels"):
        quantize_inputs(x, parse_inputs("float:divisor"))


@pytest.mark.parametrize("text", ["int8", "uint8:asym", "uint8:zero=fp32", "int4:narrow", "fp8"])
def test_a_range_ends_on_the_outermost_levels(text: str) -> None:
    fmt = parse_format(text)
    low, high = torch.tensor([-1.5, -3.0, 0.5]), torch.tensor([2.0, 0.25, 4.0])
    scale, offset = range_to_scale(low, high, fmt)
    z = torch.zeros(3) if offset is None else offset
    reach = (fmt.grid.lo - z) * scale, (fmt.grid.hi - z) * scale
    slack = 0.5 * scale * (text == "uint8:asym") + 1e-6
    assert bool((reach[0] <= low + slack).all() and (reach[1] >= high - slack).all())
    assert bool(((reach[1] - reach[0]) <= 2.01 * torch.maximum(low.abs(), high.abs()) + scale).all())
