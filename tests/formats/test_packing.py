"""Packing is the identity, wastes nothing, and puts element i at the bits [i * b, (i + 1) * b)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.formats import packing
from strategies import shapes, steady

CARDINALITIES = [2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256]


def random_codes(shape: tuple[int, ...], cardinality: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, cardinality, shape, dtype=torch.uint8, generator=generator)


def stream(codes: list[int], cardinality: int) -> bytes:
    """The documented layout, written with Python's big integers."""
    if cardinality == 3:
        fives = [codes[i : i + 5] for i in range(0, len(codes), 5)]
        return bytes(sum(code * 3**j for j, code in enumerate(five)) for five in fives)
    bits = (cardinality - 1).bit_length()
    value = sum(code << (i * bits) for i, code in enumerate(codes))
    return value.to_bytes(-(-len(codes) * bits // 8), "little")


@steady(300)
@given(shapes(), st.sampled_from(CARDINALITIES), st.integers(0, 10**6))
def test_pack_writes_the_documented_bytes_and_unpack_reads_them(shape, cardinality, seed):
    codes = random_codes(shape, cardinality, seed)
    packed = packing.pack(codes, cardinality)
    assert packed.dtype == torch.uint8 and tuple(packed.shape) == packing.packed_shape(shape, cardinality)
    assert bytes(packed.reshape(-1).tolist()) == stream(codes.reshape(-1).tolist(), cardinality)
    assert torch.equal(packing.unpack(packed, shape, cardinality), codes)


@pytest.mark.parametrize("cardinality", CARDINALITIES)
def test_bytes_are_the_least_that_hold_the_codes(cardinality):
    for count in range(100):
        if cardinality == 3:
            expected = math.ceil(count / 5)
        else:
            expected = math.ceil(count * math.ceil(math.log2(cardinality)) / 8)
        assert packing.packed_bytes(count, cardinality) == expected
        assert packing.pack(torch.zeros(count, dtype=torch.uint8), cardinality).numel() == expected


@pytest.mark.parametrize(
    ("bits", "codes", "golden"),
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 0, 1, 1], "0103"),
        (2, [1, 2, 3, 0, 3], "3903"),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], "d158 1f"),
        (4, [1, 2, 15], "210f"),
        (5, [1, 2, 3, 31, 0, 16, 8, 4], "418c 0f20 22"),
        (6, [1, 2, 3, 63], "8130 fc"),
        (7, [1, 127], "813f"),
        (8, [1, 255], "01ff"),
    ],
)
def test_golden_bytes(bits, codes, golden):
    packed = packing.pack(torch.tensor(codes, dtype=torch.uint8), 1 << bits)
    assert bytes(packed.tolist()) == bytes.fromhex(golden)


def test_golden_ternary_bytes():
    packed = packing.pack(torch.tensor([2, 2, 2, 2, 2, 0, 1], dtype=torch.uint8), 3)
    assert packed.tolist() == [242, 3]


@pytest.mark.parametrize("cardinality", [3, 8, 32, 128])
def test_long_streams_cross_the_chunks_unharmed(cardinality, monkeypatch):
    monkeypatch.setattr(packing, "_CHUNK", 64)
    codes = random_codes((1001,), cardinality, 5)
    packed = packing.pack(codes, cardinality)
    assert bytes(packed.tolist()) == stream(codes.tolist(), cardinality)
    assert torch.equal(packing.unpack(packed, (1001,), cardinality), codes)


def test_rows_stay_rows_where_they_fill_whole_bytes():
    assert packing.packed_shape((5, 16), 8) == (5, 6)
    assert packing.packed_shape((2, 5, 16), 16) == (2, 5, 8)
    assert packing.packed_shape((5, 15), 8) == (29,)
    assert packing.packed_shape((5, 10), 3) == (5, 2)
    codes = random_codes((5, 16), 8, 0)
    assert torch.equal(packing.pack(codes, 8)[3], packing.pack(codes[3], 8))


def test_packing_copies():
    codes = torch.tensor([1, 2], dtype=torch.uint8)
    packing.pack(codes, 256)[0] = 7
    assert codes.tolist() == [1, 2]
