"""The blocks of GGUF files, as ggml lays them out (ggml-common.h), taken apart into codes and scales.

Each function takes uint8 [n, bytes of a block] and gives *row_parts*: `codes` uint8 [n, weights of a block], and scales and
offsets as the format of lowbit with the same values stores them (`FORMATS`), one row for each block. Names with a dot are of
nested formats: `scale.codes` are scales in few bits, `scale.scale` what they are multiplied with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Planes = dict[str, Tensor]
Unpack = Callable[[Tensor], Planes]

# ggml type -> the format that has exactly its values. Minima of the k-quants are subtracted, so their outer scale is negative.
FORMATS = {
    "Q4_0": "int4:g32",
    "Q4_1": "uint4:g32:min=fp16",
    "Q5_0": "int5:g32",
    "Q5_1": "uint5:g32:min=fp16",
    "Q8_0": "int8:g32",
    "Q2_K": "uint2:g16:s=(uint4:g16):min=(uint4:g16)",
    "Q3_K": "int3:g16:s=(int6:g16)",
    "Q4_K": "uint4:g32:s=(uint6:g8):min=(uint6:g8)",
    "Q5_K": "uint5:g32:s=(uint6:g8):min=(uint6:g8)",
    "Q6_K": "int6:g16:s=(int8:g16)",
    "IQ4_NL": "iq4nl:g32",
    "IQ4_XS": "iq4nl:g32:s=(int6:g8)",
    "MXFP4": "mxfp4",
}


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of each block, [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def _nibbles(blocks: Tensor, run: int) -> Tensor:
    """Codes of 4 bits: of every `run` bytes the low nibbles, then the high ones."""
    parts = blocks.reshape(len(blocks), -1, 1, run)
    return torch.cat([parts & 15, parts >> 4], dim=2).reshape(len(blocks), -1)


def _fields(blocks: Tensor, run: int, bits: int) -> Tensor:
    """Codes of 1, 2 or 4 bits: of every `run` bytes the lowest field of each, then the next, ..."""
    parts = blocks.reshape(len(blocks), -1, 1, run)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(1, 1, -1, 1)
    return ((parts >> shifts) & ((1 << bits) - 1)).reshape(len(blocks), -1)


def _bits(blocks: Tensor) -> Tensor:
    """Bits of little-endian bytes in order, [n, 8 bytes]."""
    return _fields(blocks.reshape(-1, 1), 1, 1).reshape(len(blocks), -1)


def _q4_0(b: Tensor) -> Planes:
    return {"codes": _nibbles(b[:, 2:], 16), "scale": _half(b, 0)}


def _q4_1(b: Tensor) -> Planes:
    return {"codes": _nibbles(b[:, 4:], 16), "scale": _half(b, 0), "offset": _half(b, 2)}


def _q5_0(b: Tensor) -> Planes:
    return {"codes": _nibbles(b[:, 6:], 16) | (_bits(b[:, 2:6]) << 4), "scale": _half(b, 0)}


def _q5_1(b: Tensor) -> Planes:
    return {
        "codes": _nibbles(b[:, 8:], 16) | (_bits(b[:, 4:8]) << 4), "scale": _half(b, 0), "offset": _half(b, 2),
    }  # fmt: skip


def _q8_0(b: Tensor) -> Planes:
    return {"codes": b[:, 2:] ^ 128, "scale": _half(b, 0)}


def _mxfp4(b: Tensor) -> Planes:
    return {"codes": _nibbles(b[:, 1:], 16), "scale": b[:, :1]}


def _q2_k(b: Tensor) -> Planes:
    return {
        "codes": _fields(b[:, 16:80], 32, 2),
        "scale.codes": b[:, :16] & 15, "scale.scale": _half(b, 80),
        "offset.codes": b[:, :16] >> 4, "offset.scale": -_half(b, 82),
    }  # fmt: skip


def _q3_k(b: Tensor) -> Planes:
    high = _fields(b[:, :32], 32, 1)  # bit k of byte l belongs to the weight 32 k + l
    low = _fields(b[:, 96:104], 8, 4)
    top = _fields(b[:, 104:108], 4, 2)
    return {
        "codes": _fields(b[:, 32:96], 32, 2) | (high << 2),
        "scale.codes": low | (top << 4), "scale.scale": _half(b, 108),
    }  # fmt: skip


def _six_bits(s: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits out of 12 bytes, as Q4_K and Q5_K pack them."""
    scales = torch.cat([s[:, :4] & 63, (s[:, 8:] & 15) | ((s[:, :4] >> 6) << 4)], dim=1)
    minima = torch.cat([s[:, 4:8] & 63, (s[:, 8:] >> 4) | ((s[:, 4:8] >> 6) << 4)], dim=1)
    return scales, minima


def _scales_k(b: Tensor) -> Planes:
    scales, minima = _six_bits(b[:, 4:16])
    return {
        "scale.codes": scales, "scale.scale": _half(b, 0), "offset.codes": minima, "offset.scale": -_half(b, 2),
    }  # fmt: skip


def _q4_k(b: Tensor) -> Planes:
    return {"codes": _nibbles(b[:, 16:], 32)} | _scales_k(b)


def _q5_k(b: Tensor) -> Planes:
    return {"codes": _nibbles(b[:, 48:], 32) | (_fields(b[:, 16:48], 32, 1) << 4)} | _scales_k(b)


def _q6_k(b: Tensor) -> Planes:
    low = b[:, :128].reshape(-1, 2, 64)
    low = torch.cat([low & 15, low >> 4], dim=2).reshape(len(b), -1)
    return {
        "codes": low | (_fields(b[:, 128:192], 32, 2) << 4), "scale.codes": b[:, 192:208] ^ 128, "scale.scale": _half(b, 208),
    }  # fmt: skip


def _iq4_xs(b: Tensor) -> Planes:
    low, high = _fields(b[:, 4:8], 1, 4), _fields(b[:, 2:4], 1, 2)
    return {"codes": _nibbles(b[:, 8:], 16), "scale.codes": low | (high << 4), "scale.scale": _half(b, 0)}


UNPACK: dict[str, Unpack] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _q4_0, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip
