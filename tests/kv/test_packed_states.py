"""What a cache holds and gives back, position by position, against `round_trip`; and its bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.kv import CacheSide, Tables, round_trip
from lowbit.kv.learning import Observed, learn_tables
from lowbit.kv.packed_states import PackedStates
from lowbit.kv.side import parse_side
from strategies import steady

SIDES = [
    "int16", "int8", "int3", "uint4:g8:asym", "int4:g5", "rotate+norm@normal3", "rotate@int8:recent=3", "ternary:sinks=2",
    "uint2:4x1:min=fp16", "uint5:4x1:zero=fp16:recent=6:sinks=3", "int4:*x1", "kmeans3:*x1:cb=tensor:sinks=1:outliers=2",
    "search@kmeans2:cb=tensor:recent=2", "uint4:*x1:min=fp16:outliers=1", "rotate@int4:outliers=3", "int5:3x1:sinks=5",
]  # fmt: skip
HEADS, WIDTH = 2, 12


def numbers(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 3] *= 9
    x[..., 7] += 4
    return x


def tables_of(side: CacheSide) -> Tables | None:
    if not side.calibrated and not side.outliers:
        return None
    return learn_tables(side, Observed(numbers(HEADS, 200, WIDTH, seed=5)))


def expected(x: Tensor, side: CacheSide, tables: Tables | None, query: int, stored: int) -> Tensor:
    """What a query at `query` reads of x [heads, tokens, width], of which `stored` are in whole groups."""
    y = x.clone()
    y[:, :stored] = round_trip(x[:, :stored], side, tables)
    for j in range(x.shape[1]):
        # a side with neither recent tokens nor groups reads even new tokens as stored
        new = j >= side.first_recent(query) if side.recent or side.group > 1 else False
        if j < side.sinks or new:
            y[:, j] = x[:, j]
    return y


@steady(150)
@given(
    st.sampled_from(SIDES),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.lists(st.integers(1, 4), max_size=6),
)
def test_every_chunk_reads_what_the_reference_gives(text: str, chunks: list[int], crops: list[int]) -> None:
    side = parse_side(text)
    tables = tables_of(side)
    states = PackedStates(side, tables)
    states.recording = True
    rows = [numbers(HEADS, 0, WIDTH) for _ in range(2)]
    for i, chunk in enumerate(chunks):
        new = numbers(2, HEADS, chunk, WIDTH, seed=i)
        query = states.length
        found = states.append(new)
        rows = [torch.cat([row, n], dim=1) for row, n in zip(rows, new, strict=True)]
        stored = 0 if side.exact else states.length // side.group * side.group
        for row, got in zip(rows, found, strict=True):
            assert torch.equal(got, expected(row, side, tables, query, stored))
        gone = min(crops[i], chunk) if i < len(crops) else 0
        states.recording = False
        states.crop(gone)  # takes back some, and lets the others be as if these had never come
        states.recording = True
        rows = [row[:, : row.shape[1] - gone] for row in rows]
        assert states.length == rows[0].shape[1]


@pytest.mark.parametrize("text", [side for side in SIDES if side != "int16"])
@pytest.mark.parametrize("tokens", [1, 3, 24, 60])
def test_bytes_are_those_of_the_plan(text: str, tokens: int) -> None:
    """Of whole groups to the byte; tokens of an open one are held exactly, within what the plan allows for."""
    side = parse_side(text)
    states = PackedStates(side, tables_of(side))
    x = numbers(1, HEADS, tokens, WIDTH).to(torch.bfloat16)
    for part in (x[..., : tokens // 2, :], x[..., tokens // 2 :, :]):
        if part.shape[-2]:
            states.append(part)
    stored = tokens // side.group * side.group
    newest = min(tokens, max(side.recent, tokens - stored))
    exact = min(tokens, newest + side.sinks)
    assert states.nbytes == HEADS * (side.nbytes(stored, WIDTH) + 2 * exact * WIDTH)
    assert states.nbytes <= HEADS * (side.nbytes(tokens, WIDTH) + 2 * side.exact_tokens(tokens) * WIDTH)


def test_packed_parts_are_small() -> None:
    states = PackedStates(parse_side("int4:g32"))
    states.append(torch.randn(1, 4, 1000, 64, dtype=torch.bfloat16))
    assert states.nbytes == 4 * 1000 * (32 + 4)
    assert sum(t.untyped_storage().nbytes() for t in [*states.parts.values(), states.tail]) == states.nbytes


def test_a_window_forgets_whole_groups_and_reads_the_same() -> None:
    side = parse_side("uint4:4x1:min=fp16")
    x = numbers(1, HEADS, 30, WIDTH)
    whole, window = PackedStates(side), PackedStates(side)
    for i in range(30):
        a, b = whole.append(x[..., i : i + 1, :]), window.append(x[..., i : i + 1, :])
        window.drop_before(i - 7)
        assert torch.equal(a[..., -b.shape[-2] :, :][..., -8:, :], b[..., -8:, :])
    assert window.first == 20 and window.nbytes < whole.nbytes / 2


def test_what_was_trimmed_is_read_as_stored_after_a_crop() -> None:
    side = parse_side("uint4:4x1:min=fp16:recent=2")
    states, x = PackedStates(side), numbers(1, HEADS, 8, WIDTH)
    states.append(x)
    states.crop(3)
    y = round_trip(x[0], side)
    found = states.read(5)
    assert torch.equal(found[0, :, :4], y[:, :4]) and torch.equal(found[0, :, 4], y[:, 4])  # its exact copy was gone
    states.append(x[..., 5:, :])
    assert states.packed == 8


def test_each_sequence_chooses_its_outliers_without_tables() -> None:
    side = parse_side("int4:outliers=1")
    x = torch.randn(2, 1, 40, 8, generator=torch.Generator().manual_seed(0))
    x[0, :, :, 2] *= 50
    x[1, :, :, 6] *= 50
    states = PackedStates(side)
    found = states.append(x)
    assert states.channels is not None and states.channels[:, 0, 0].tolist() == [2, 6]
    for row in range(2):
        assert torch.equal(found[row], round_trip(x[row], side))
    states.each(lambda t: t.flip(0))
    assert torch.equal(states.read(states.length), found.flip(0))


def test_tables_of_another_shape_are_refused() -> None:
    side = parse_side("int4:*x1")
    with pytest.raises(LowbitError, match="scale is .* not"):
        PackedStates(side, tables_of(side)).append(torch.randn(1, HEADS + 1, 4, WIDTH))
