"""Layouts of other programs, against loops written from their description; packing and unpacking are inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.interchange.layouts.awq import ORDER, pack_awq, unpack_awq
from lowbit.interchange.layouts.compressed import (
    pack_weight,
    pack_zero_points,
    signed_codes,
    signed_levels,
    unpack_weight,
    unpack_zero_points,
)
from lowbit.interchange.layouts.gptq import pack_gptq, unpack_gptq
from lowbit.interchange.layouts.words import pack_words, unpack_words

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)


def random_codes(rows: int, count: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, count), generator=generator, dtype=torch.uint8)


def as_word(value: int) -> int:
    """The 32 low bits as a signed number."""
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)


def stream_of(codes: list[int], bits: int) -> list[int]:
    """Dense words by the definition: element i begins at bit i * bits of one long number."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return [as_word(number >> (32 * w)) for w in range(-(-len(codes) * bits // 32))]


@settings(deadline=None, max_examples=60)
@given(bits=st.sampled_from(WIDTHS), rows=st.integers(1, 4), count=st.integers(1, 100), seed=st.integers(0, 99))
def test_words_are_one_stream_of_bits(bits: int, rows: int, count: int, seed: int) -> None:
    codes = random_codes(rows, count, bits, seed)
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32 and words.tolist() == [stream_of(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_words(words, bits, count), codes)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64])
def test_words_of_other_widths_hold_the_same_stream(dtype: torch.dtype) -> None:
    codes = random_codes(3, 64, 4)
    assert torch.equal(unpack_words(pack_words(codes, 4, dtype), 4, 64), codes)
    assert torch.equal(pack_words(codes, 4, dtype).view(torch.uint8), pack_words(codes, 4).view(torch.uint8))


def test_too_few_words_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 words of 32 bits hold no 17 codes of 4 bits"):
        unpack_words(torch.zeros(1, 2, dtype=torch.int32), 4, 17)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_tensors_say_what_its_description_says(bits: int, version: int) -> None:
    out, width, groups = 32, 96, 3
    codes, zeros = random_codes(out, width, bits), random_codes(out, groups, bits, 1)
    scales = torch.rand(out, groups).half()
    made = pack_gptq(codes, zeros, scales, bits, version=version)
    for o in (0, 13, out - 1):
        assert made["qweight"][:, o].tolist() == stream_of(codes[o].tolist(), bits)
    for g in range(groups):
        kept = [(z - (version == 1)) % (1 << bits) for z in zeros[:, g].tolist()]
        assert made["qzeros"][g].tolist() == stream_of(kept, bits)
        assert torch.equal(made["scales"][g], scales[:, g])
    for found, wanted in zip(unpack_gptq(**made, bits=bits, version=version), (codes, zeros, scales)):
        assert torch.equal(found, wanted)


def test_awq_words_hold_eight_outputs_in_the_interleaved_order() -> None:
    out, width, groups = 24, 10, 2
    codes, zeros, scales = random_codes(out, width, 4), random_codes(out, groups, 4, 1), torch.rand(out, groups).half()
    made = pack_awq(codes, zeros, scales)
    assert sorted(ORDER) == list(range(8))
    for i in range(width):
        for word in range(out // 8):
            value = sum(int(codes[8 * word + ORDER[j], i]) << (4 * j) for j in range(8))
            assert int(made["qweight"][i, word]) == as_word(value)
    for found, wanted in zip(unpack_awq(**made), (codes, zeros, scales)):
        assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="20 are no multiple of 8"):
        pack_awq(codes[:20], zeros[:20], scales[:20])


@settings(deadline=None, max_examples=40)
@given(bits=st.sampled_from(WIDTHS), rows=st.integers(1, 40), count=st.integers(1, 70))
def test_compressed_words_come_back(bits: int, rows: int, count: int) -> None:
    codes = random_codes(rows, count, bits)
    assert torch.equal(unpack_weight(pack_weight(codes, bits), bits, count), codes)
    zeros = pack_zero_points(codes, bits)
    assert zeros.shape == (-(-rows * bits // 32), count)
    assert zeros[:, 0].tolist() == stream_of(codes[:, 0].tolist(), bits)
    assert torch.equal(unpack_zero_points(zeros, bits, rows), codes)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_older_words_hold_whole_codes_only(bits: int) -> None:
    count, each = 160, 32 // bits
    codes = random_codes(2, count, bits)
    words = torch.tensor([
        [as_word(sum(c << (j * bits) for j, c in enumerate(row[at : at + each]))) for at in range(0, count, each)]
        for row in codes.tolist()
    ], dtype=torch.int32)  # fmt: skip
    assert torch.equal(unpack_weight(words, bits, count), codes)
    with pytest.raises(ValueError, match="not what"):
        unpack_weight(words[:, :1], bits, count)


def test_signed_levels_are_codes_about_the_middle() -> None:
    levels = torch.arange(-8, 8, dtype=torch.int8)
    assert signed_codes(levels, 4).tolist() == list(range(16))
    assert torch.equal(signed_levels(signed_codes(levels, 4), 4), levels)
    with pytest.raises(ValueError, match="outside of 3 bits"):
        signed_codes(levels, 3)
