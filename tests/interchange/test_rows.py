"""Rows of quantized weights moved by number, held against the values of the same rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lowbit.formats import QTensor, parse_format
from lowbit.interchange.rows import each_once, from_row_parts, gather, numbered, row_parts_of, why_whole
from strategies import formats, random_parts, steady

IN_ROWS = (
    "int4:g32",
    "int8:channel",
    "uint4:g32:asym",
    "uint4:g32:s=(uint6:g8):min=(uint6:g8)",
    "mxfp4",
    "fp8:channel",
)
SEEDS = st.integers(0, 10**6)


def weight(text: str, *shape: int, seed: int = 0) -> QTensor:
    fmt = parse_format(text)
    return QTensor.from_parts(fmt, shape, random_parts(fmt, shape, seed))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("text", IN_ROWS)
def test_rows_of_several_weights(text: str) -> None:
    """Weights of unlike sizes, their rows mixed into a stack."""
    few, many = weight(text, 6, 512), weight(text, 10, 512, seed=1)
    assert why_whole(few.format, few.shape, joined=True) is None
    numbers = torch.randperm(16, generator=torch.Generator().manual_seed(1)).view(2, 8)
    found = gather(few.format, numbers, [(0, row_parts_of(few)), (6, row_parts_of(many))])
    assert torch.equal(found.unpacked(), torch.cat([few.unpacked(), many.unpacked()])[numbers])
    assert same(found.dequantize(), torch.cat([few.dequantize(), many.dequantize()])[numbers])


@steady(200)
@given(formats(), st.tuples(st.integers(1, 3), st.integers(1, 8), st.sampled_from((32, 64, 96))), SEEDS)
def test_row_parts_are_the_whole_weight_and_rows_of_an_expert_are_its_rows(fmt, shape, seed) -> None:
    assume(why_whole(fmt, shape, joined=False) is None)
    q = QTensor.from_parts(fmt, shape, random_parts(fmt, shape, seed))
    again = from_row_parts(fmt, shape, row_parts_of(q))
    assert {name: (part.dtype, part.shape) for name, part in again.parts().items()} == fmt.parts(shape)
    assert torch.equal(again.unpacked(), q.unpacked()) and same(again.dequantize(), q.dequantize())
    last = gather(fmt, numbered(shape)[-1, :, 0].flip(0), [(0, row_parts_of(q))])
    assert last.shape == shape[1:] and same(last.dequantize(), q.dequantize()[-1].flip(0))


def test_a_scale_of_an_expert_goes_to_no_other_weight() -> None:
    q = weight("int8:tensor", 3, 8, 64)
    assert why_whole(q.format, q.shape, joined=False) is None
    assert "several rows" in str(why_whole(q.format, q.shape, joined=True))


def test_numbers_that_do_not_come_back_each_once() -> None:
    ids = numbered((2, 3, 8))
    assert ids.shape == (2, 3, 1) and each_once(ids.flip(0), 6)
    assert not each_once(ids[:1], 6) and not each_once(ids + 1, 6) and not each_once(ids.clamp(max=4), 6)
