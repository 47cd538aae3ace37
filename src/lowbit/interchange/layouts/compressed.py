"""The tensors of a compressed-tensors layer [out, in].

pack-quantized: `weight_packed` int32 [out, ceil(in * bits / 32)], dense along the inputs; `weight_zero_point`
int32 [ceil(out * bits / 32), groups], dense along the outputs. Codes are unsigned, level + 2^(bits-1), for both.
fp4 formats: `weight_packed` uint8 [out, in / 2], the first of two codes in the low nibble.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.interchange.layouts.words import pack_words, padded_words, unpack_padded_words, unpack_words


def pack_weight(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [out, in] -> `weight_packed`."""
    return pack_words(codes, bits)


def unpack_weight(packed: Tensor, bits: int, width: int) -> Tensor:
    """`weight_packed` -> uint8 codes [out, width]. ValueError when its words are not as many as that takes.

    The number of words tells older checkpoints, where no code straddles two words, from today's.
    """
    words = packed.shape[-1]
    if words == -(-width * bits // 32):
        return unpack_words(packed, bits, width)
    if words == padded_words(width, bits):
        return unpack_padded_words(packed, bits, width)
    raise ValueError(f"{words} words of 32 bits are not what {width} codes of {bits} bits take")


def pack_zero_points(zeros: Tensor, bits: int) -> Tensor:
    """uint8 codes [out, groups] of zero-points -> `weight_zero_point`."""
    return pack_words(zeros.T, bits).T.contiguous()


def unpack_zero_points(packed: Tensor, bits: int, rows: int) -> Tensor:
    """`weight_zero_point` -> uint8 codes [rows, groups]."""
    return unpack_weight(packed.T.contiguous(), bits, rows).T.contiguous()


def signed_codes(values: Tensor, bits: int) -> Tensor:
    """int8 levels -> uint8 codes, level + 2^(bits-1). ValueError when one is out of range."""
    codes = values.to(torch.int16) + (1 << (bits - 1))
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << bits:
        raise ValueError(f"has levels outside of {bits} bits")
    return codes.to(torch.uint8)


def signed_levels(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes -> int8 levels, code - 2^(bits-1)."""
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
