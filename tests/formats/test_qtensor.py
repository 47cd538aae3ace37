"""A QTensor is its parts: sizes, round trips, rows, and the value formula by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.formats import QTensor, encode, parse_format
from lowbit.formats.blocks import Block
from lowbit.formats.packing import pack
from lowbit.formats.qtensor import load, save
from lowbit.solvers import Call
from strategies import formats, normal, random_parts, shapes, steady

SEEDS = st.integers(0, 10**6)


def random_qtensor(fmt, shape, seed) -> QTensor:
    return QTensor.from_parts(fmt, shape, random_parts(fmt, shape, seed))


@steady(300)
@given(formats(), shapes(), SEEDS)
def test_parts_bytes_and_bits_are_exact(fmt, shape, seed):
    q = random_qtensor(fmt, shape, seed)
    parts = q.parts()
    assert {k: (v.dtype, tuple(v.shape)) for k, v in parts.items()} == fmt.parts(shape)
    actual = sum(len(v.contiguous().view(-1).view(torch.uint8)) for v in parts.values() if v.numel())
    count = math.prod(shape)
    assert q.nbytes == fmt.nbytes(shape) == actual
    assert q.bits_per_weight == fmt.bits_per_weight(shape) == (8 * actual / count if count else 0.0)
    again = QTensor.from_parts(fmt, shape, parts)
    assert torch.equal(again.dequantize().nan_to_num(7), q.dequantize().nan_to_num(7))


@steady(150)
@given(formats(), shapes(), SEEDS)
def test_dequantize_is_the_formula_block_by_block(fmt, shape, seed):
    q = random_qtensor(fmt, shape, seed)
    sizes = (math.prod((1, 1, *shape)[:-2]), *(1, 1, *shape)[-2:])
    found, codes = q.dequantize().view(sizes), q.unpacked().view(sizes)
    scale, offset, levels = q.scales(), q.offsets(), q.levels

    def spot(block: Block, b: int, r: int, c: int) -> tuple[int, int, int]:
        return b, 0 if block.rows == -1 else r // block.rows, 0 if block.cols == -1 else c // block.cols

    for b, r, c in torch.cartesian_prod(*(torch.arange(s) for s in sizes)).view(-1, 3)[::17].tolist():
        code, at = int(codes[b, r, c]), spot(fmt.block, b, r, c)
        assume(code < fmt.grid.cardinality)
        if fmt.codebook is not None:
            value = float(levels[spot(fmt.codebook, b, r, c)][code]) * (1 if scale is None else float(scale[at]))
        elif fmt.offset_kind == "min":
            value = float(scale[at]) * float(fmt.grid.levels[code]) + float(offset[at])
        else:
            value = float(scale[at]) * (float(fmt.grid.levels[code]) - (0 if offset is None else float(offset[at])))
        size = abs(value) + (abs(float(offset[at])) if offset is not None else 0)
        assert float(found[b, r, c]) == pytest.approx(value, rel=3e-7, abs=3e-7 * size + 1e-37)


@steady(200)
@given(formats(), shapes(least=1), SEEDS)
def test_index_is_rows_of_dequantize(fmt, shape, seed):
    assume(len(shape) > 0)
    q = random_qtensor(fmt, shape, seed)
    rows = torch.randint(0, shape[0], (2, 3), generator=torch.Generator().manual_seed(seed))
    for wanted in (rows, rows[0], rows[0, 0], rows[:0]):
        assert torch.equal(q.index(wanted).nan_to_num(7), q.dequantize()[wanted].nan_to_num(7))
    assert q.index(rows, torch.float16).dtype == torch.float16


def test_index_of_four_dimensions():
    q = encode(normal((2, 3, 4, 8), 0), parse_format("int4:g4"), torch.ones(6, 4, 2))
    assert torch.equal(q.index(torch.tensor([1, 0])), q.dequantize()[[1, 0]])


@pytest.mark.parametrize(
    "text", ["int4:g8", "nf4-dq", "uint4:channel:asym", "kmeans4:channel", "kmeans3:g8:cb=tensor", "int8:tensor"]
)
def test_rows_are_picked_without_expanding_the_rest(text):
    q = random_qtensor(parse_format(text), (40, 16), 0)
    rows = torch.tensor([3, 39, 3])
    picked = q.select(rows)
    assert picked is not None and picked.shape == (3, 16) and picked.codes.shape[0] == 3
    assert torch.equal(picked.dequantize(), q.dequantize()[rows])


@pytest.mark.parametrize("text", ["int4:2x8", "kmeans4:2x8:cb=tensor", "kmeans4:g8:cb=2x8", "int3:g8"])
def test_rows_that_share_a_block_or_a_byte_are_not_picked(text):
    assert random_qtensor(parse_format(text), (6, 10), 0).select(torch.tensor([0])) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.pop("scale.codes"), "is stored as"),
        (lambda p: p.update(extra=torch.zeros(1)), "is stored as"),
        (lambda p: p.update({"codes": p["codes"].view(torch.int8)}), "part 'codes'"),
        (lambda p: p.update({"codes": p["codes"][:-1]}), "part 'codes'"),
        (lambda p: p.update({"scale.scale": p["scale.scale"].half()}), "part 'scale.scale'"),
    ],
)
def test_wrong_parts_are_errors_that_name_the_part(change, words):
    fmt = parse_format("nf4-dq")
    parts = random_parts(fmt, (8, 64), 0)
    change(parts)
    with pytest.raises(FormatError, match=words):
        QTensor.from_parts(fmt, (8, 64), parts)


def test_a_missing_scale_or_offset_is_an_error():
    with pytest.raises(FormatError, match="needs a scale"):
        encode(torch.ones(4), parse_format("int8"))
    with pytest.raises(FormatError, match=r"needs an? offset"):
        encode(torch.ones(4), parse_format("int8:asym"), torch.ones(1))


@steady(150)
@given(formats(), shapes(), SEEDS)
def test_encode_picks_the_nearest_stored_value(fmt, shape, seed):
    """Brute force over all codes under the scales that were stored; float32 rounding of x / s aside."""
    assume(fmt.codebook is None)
    x = normal(shape, seed)
    counts = fmt.block.counts(shape)
    scale = normal(counts, seed + 1).abs() * 0.1 + 0.02
    offset = None if fmt.offset is None else (fmt.grid.lo + fmt.grid.hi) / 2 + normal(counts, seed + 2)
    q = encode(x, fmt, scale, offset)
    levels = fmt.grid.levels
    nearest = torch.full(shape, math.inf)
    for code in range(fmt.grid.cardinality):
        if levels[code].isfinite():
            codes = pack(torch.full(shape, code, dtype=torch.uint8), fmt.grid.cardinality)
            other = QTensor(fmt, shape, codes, q.scale, q.offset).dequantize()
            nearest = torch.minimum(nearest, (other - x).abs())
    slack = 1e-5 * (x.abs() + q.dequantize().abs() + 0.1)
    assert bool(((q.dequantize() - x).abs() <= nearest + slack).all())


@pytest.mark.parametrize(
    "text",
    [
        "uint8:g16:s=fp32",
        "uint8:g16:asym:s=fp32",
        "int6:g16:min=fp32:s=fp32",
        "int8:tensor",
        "uint8:g16:zero=fp32:s=fp32",
    ],
)
def test_a_nested_format_keeps_scales_within_half_its_step(text):
    values = (normal((4, 40), 3).abs() + 3).view(1, 4, 40)
    how = parse_format(text)
    kept = save(values, how)
    steps = (how.grid.hi - how.grid.lo) if how.offset else how.grid.hi
    step = float(values.max()) / steps
    back = load(kept, how, (1, 4, 40))
    assert float((back - values).abs().max()) <= step * (1.001 if how.offset else 0.5001)


def test_values_of_both_signs_do_not_fit_an_unsigned_nested_format():
    how = parse_format("uint6:g8")
    with pytest.raises(FormatError, match="unsigned nested format"):
        save(torch.tensor([[[1.0, -1.0]]]), how)
    values = -torch.rand(1, 1, 16)
    back = load(save(values, how), how, (1, 1, 16))
    assert float((back - values).abs().max()) <= 0.51 / 63 and bool((back <= 0).all())


@pytest.mark.parametrize("fit", ["minmax", "search", "mse", "hqq"])
def test_a_minimum_in_an_unsigned_grid_is_at_most_zero(fit):
    """Blocks above zero are covered from zero on, whatever the fit; the error of rounding is still half a step."""
    fmt = parse_format("uint4:g8:s=(uint8:g4):min=(uint8:g4)")
    assert fmt.spans_zero and not parse_format("uint4:g8:min=(int6:g4)").spans_zero
    x = torch.rand(3, 32, generator=torch.Generator().manual_seed(0)) + torch.tensor([[1.0], [-2.0], [-0.5]])
    q = Call("rtn")(x, fmt, Call(fit), None)
    assert bool((q.offsets() <= 0).all()) and bool((q.scales() >= 0).all())
    assert float((q.dequantize() - x).abs().max()) < 0.2


@pytest.mark.parametrize(
    ("text", "shape", "bits"),
    [
        ("nf4:g64", (4096, 4096), 4.25),
        ("nf4-dq", (4096, 4096), 4 + 8 / 64 + 32 / (64 * 256)),  # 4.127, QLoRA section 3
        ("mxfp4", (4096, 4096), 4.25),
        ("mxfp8", (4096, 4096), 8.25),
        ("nvfp4", (4096, 4096), 4.5 + 32 / 4096**2),
        ("q4_0", (4096, 4096), 4.5),
        ("q4_1", (4096, 4096), 5.0),
        ("q4_k", (4096, 4096), 4.5),
        ("q8_0", (4096, 4096), 8.5),
        ("iq4nl:g32", (4096, 4096), 4.5),
        ("ternary:g128", (4096, 4096 * 5), 1.6 + 16 / 128),
        ("int3:g128", (4096, 4096), 3.125),
        ("int4:g128:asym", (4096, 4096), 4 + 16 / 128 + 4 / 128),
        ("int8:channel", (4096, 4096), 8 + 32 / 4096),
        ("int8:tensor", (4096, 4096), 8 + 32 / 4096**2),
        ("kmeans4:channel", (4096, 4096), 4 + 16 * 16 / 4096),
    ],
)
def test_published_bits_per_weight(text, shape, bits):
    assert parse_format(text).bits_per_weight(shape) == pytest.approx(bits, rel=1e-12)


def test_moving_keeps_the_parts():
    q = random_qtensor(parse_format("nf4-dq"), (4, 64), 0)
    moved = q.to("cpu")
    assert all(torch.equal(moved.parts()[k], v) for k, v in q.parts().items())
    assert "4.1" not in repr(q) and "nf4" in repr(q) and "(4, 64)" in repr(q)
