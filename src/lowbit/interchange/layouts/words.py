"""Codes in machine words.

Dense: a row of codes is one little-endian stream of bits, element i at the bits [i * bits, (i + 1) * bits), cut into words;
a code may straddle two of them. For 1, 2, 4 and 8 bits that is `32 / bits` codes to a word of 32 bits, lowest bits first.
GPTQ (all widths) and compressed-tensors use it. Padded: whole codes only, so that 3, 5, 6 and 7 bits leave the highest bits of
each word unused; older releases of compressed-tensors wrote these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats.packing import pack, unpack


def pack_words(codes: Tensor, bits: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """uint8 codes [..., n], each below 2^bits -> words of `dtype` [..., ceil(n * bits / bits of a word)], dense."""
    *rows, count = codes.shape
    size = 8 * dtype.itemsize
    words = -(-count * bits // size)
    padded = torch.nn.functional.pad(codes, (0, -count % size))  # so that every row fills whole words
    packed = pack(padded.reshape(-1, padded.shape[-1]), 1 << bits)
    return packed.view(dtype)[:, :words].reshape(*rows, words)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row: words [..., w] of any integer type -> uint8 [..., count]."""
    *rows, width = words.shape
    size = 8 * words.dtype.itemsize
    if width * size < count * bits:
        raise ValueError(f"{width} words of {size} bits hold no {count} codes of {bits} bits")
    padded = torch.nn.functional.pad(words, (0, -width % bits)).reshape(-1, width + -width % bits).contiguous()
    codes = unpack(padded.view(torch.uint8), (padded.shape[0], padded.shape[1] * size // bits), 1 << bits)
    return codes[:, :count].reshape(*rows, count)


def padded_words(count: int, bits: int) -> int:
    """Words of 32 bits that hold `count` codes, none of them across two."""
    return -(-count // (32 // bits))


def unpack_padded_words(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [..., w] with 32 // bits codes to a word -> uint8 [..., count]."""
    each = 32 // bits
    shifts = torch.arange(each, dtype=torch.int32) * bits
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).reshape(*words.shape[:-1], words.shape[-1] * each)[..., :count].contiguous()
