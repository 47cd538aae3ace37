"""The reference is what formats give, whatever the block, the store and the width; and what outliers and rotation add to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.kv import CacheSide, round_trip
from lowbit.kv.round_trip import rotated, store
from lowbit.kv.side import parse_side
from lowbit.kv.storing import Storing
from lowbit.kv.tables import Tables
from strategies import steady

GRIDS = ["int2", "int5", "int8", "ternary", "nf4", "e4m3", "e2m1", "normal3", "normal6"]
OFFSETS = ["asym", "zero=int32", "zero=fp16", "min=fp16", "min=bf16"]


@st.composite
def sides(draw: st.DrawFn) -> CacheSide:
    offset = draw(st.booleans())
    grid = draw(st.sampled_from(["uint2", "uint3", "uint8"] if offset else GRIDS))
    words = [grid, draw(st.sampled_from(["token", "g4", "g5", "g32", "3x1", "8x1"]))]
    words += [draw(st.sampled_from(OFFSETS))] * offset + draw(st.sampled_from([[], ["s=bf16"], ["s=fp32"], ["s=e8m0"]]))
    fit = draw(st.sampled_from(["", "search@", "mse@"]))
    return parse_side(fit + ":".join(words))


def numbers(heads: int, tokens: int, width: int) -> Tensor:
    x = torch.randn(heads, tokens, width, generator=torch.Generator().manual_seed(tokens))
    return x * torch.logspace(-1, 1, width)


@steady(150)
@given(sides(), st.integers(1, 3), st.integers(1, 20), st.sampled_from([1, 4, 8, 12, 15, 20, 64]))
def test_it_is_what_the_format_gives(side: CacheSide, heads: int, tokens: int, width: int) -> None:
    x = numbers(heads, tokens, width)
    assert torch.equal(round_trip(x, side), store(x, side).dequantize())
    parts = Storing(side, width, Tables()).encode(x)
    assert sum(t.numel() * t.element_size() for t in parts.values()) == heads * side.nbytes(tokens, width)


@pytest.mark.parametrize(
    "text", ["int8", "int4:g32", "int3:g32", "uint2:32x1:min=fp16", "uint5:g16:zero=fp16", "normal6"]
)
def test_where_rows_fill_bytes_it_is_the_size_of_the_format(text: str) -> None:
    side = parse_side(text)
    assert side.format is not None and side.nbytes(64, 64) == side.format.nbytes((64, 64))


@pytest.mark.parametrize("text", ["int3", "rotate@int3", "search@int4:g16", "uint2:4x1:min=fp16"])
def test_outliers_are_exact_and_the_rest_is_as_if_they_were_zero(text: str) -> None:
    x = numbers(2, 16, 32)
    x[..., -3:] *= 20
    found = round_trip(x, parse_side(f"{text}:outliers=3"))
    rest = x.clone()
    rest[..., -3:] = 0
    wanted = round_trip(rest, parse_side(text))
    assert torch.equal(found[..., -3:], x[..., -3:].half().float())
    assert torch.equal(found[..., :-3], wanted[..., :-3])


def test_rotation_is_of_the_whole_and_undone() -> None:
    x = numbers(1, 5, 32)
    assert float((rotated(rotated(x), inverse=True) - x).abs().max()) < 1e-5
    side = parse_side("rotate@int4")
    wanted = rotated(store(rotated(x), parse_side("int4")).dequantize(), inverse=True)
    assert torch.equal(round_trip(x, side), wanted)
    with pytest.raises(RecipeError, match="7 channels"):
        round_trip(numbers(1, 2, 7), side)


def test_no_tokens_and_no_tables() -> None:
    assert round_trip(torch.zeros(2, 0, 8), parse_side("int4:g4")).shape == (2, 0, 8)
    with pytest.raises(RecipeError, match="calibration text"):
        round_trip(numbers(1, 2, 8), parse_side("int4:*x1"))
