"""ggml's super-blocks of 256 weights, whose scales (and minima) are themselves quantized.

The parts are those of `blocks.py`; `q.scale` is then a QTensor over the flat vector of scales, which is cut into
super-blocks where the rows are: 256 divides the columns. Layouts: `ggml-common.h`, block_q2_K to block_q6_K and
block_iq4_xs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lowbit.formats import QTensor
from lowbit.interchange.exporters.gguf.blocks import codes_of, joined, nibbles, raw

SUPER = 256


def nested(part: Any, rows: int, count: int) -> tuple[Any, Any]:
    """(codes of the `count` scales of each super-block, bytes of the float16 that they are multiples of)."""
    assert isinstance(part, QTensor)
    return part.unpacked().numpy().reshape(rows, -1, count), raw(part.scale, rows)


def minus(bytes_of_scale: Any) -> Any:
    """float16 with its sign flipped: ggml subtracts minima, whose scale we keep negative. Zero stays +0."""
    bits = bytes_of_scale.view(np.uint16)
    return np.where(bits == 0, bits, bits ^ 0x8000).astype(np.uint16).view(np.uint8)


def row_parts(codes: Any, bits: int) -> Any:
    """[..., 128 or 256 in rows of 32] -> bytes of 32 columns: row r of each `8 / bits` rows at bit r * bits."""
    per_byte = 8 // bits
    grouped = codes.reshape(*codes.shape[:-1], -1, per_byte, 32)
    out = np.zeros((*grouped.shape[:-2], 32), np.uint8)
    for r in range(per_byte):
        out |= grouped[..., r, :] << (r * bits)
    return out.reshape(*codes.shape[:-1], -1)


def six_bit_pairs(scales: Any, minima: Any) -> Any:
    """Eight scales and eight minima of six bits in 12 bytes, as Q4_K and Q5_K keep them.

    The first four of each have a byte, whose upper two bits hold the upper bits of the other four; the lower four bits
    of those share the last four bytes.
    """
    first = scales[..., :4] | (scales[..., 4:] >> 4 << 6)
    second = minima[..., :4] | (minima[..., 4:] >> 4 << 6)
    third = (scales[..., 4:] & 15) | (minima[..., 4:] << 4)
    return np.concatenate([first, second, third], axis=-1)


def q2_k(q: QTensor) -> Any:
    """16 bytes of scale (low nibble) and minimum (high nibble), codes of 2 bits, d, dmin."""
    rows, codes = q.shape[0], codes_of(q, SUPER)
    (scales, d), (minima, dmin) = nested(q.scale, rows, 16), nested(q.offset, rows, 16)
    return joined(scales | (minima << 4), row_parts(codes, 2), d, minus(dmin))


def q3_k(q: QTensor) -> Any:
    """Upper bit of the codes, their lower two bits, 16 scales of six bits in 12 bytes, d."""
    rows, codes = q.shape[0], codes_of(q, SUPER)
    scales, d = nested(q.scale, rows, 16)
    low = (scales[..., :8] & 15) | (scales[..., 8:] << 4)
    high = scales >> 4
    upper = high[..., :4] | (high[..., 4:8] << 2) | (high[..., 8:12] << 4) | (high[..., 12:] << 6)
    return joined(row_parts(codes >> 2, 1), row_parts(codes & 3, 2), low, upper, d)


def q4_k(q: QTensor) -> Any:
    """d, dmin, scales and minima, codes of 4 bits: 32 in low nibbles, the next 32 in the high ones."""
    rows, codes = q.shape[0], codes_of(q, SUPER)
    (scales, d), (minima, dmin) = nested(q.scale, rows, 8), nested(q.offset, rows, 8)
    return joined(d, minus(dmin), six_bit_pairs(scales, minima), row_parts(codes, 4))


def q5_k(q: QTensor) -> Any:
    """As Q4_K, with the fifth bit of the codes before their lower four."""
    rows, codes = q.shape[0], codes_of(q, SUPER)
    (scales, d), (minima, dmin) = nested(q.scale, rows, 8), nested(q.offset, rows, 8)
    return joined(d, minus(dmin), six_bit_pairs(scales, minima), row_parts(codes >> 4, 1), row_parts(codes & 15, 4))


def q6_k(q: QTensor) -> Any:
    """Lower four bits (64 columns a row), upper two, 16 signed scales, d."""
    rows, codes = q.shape[0], codes_of(q, SUPER)
    scales, d = nested(q.scale, rows, 16)
    lower = (codes & 15).reshape(*codes.shape[:-1], -1, 2, 64)
    low = (lower[..., 0, :] | (lower[..., 1, :] << 4)).reshape(*codes.shape[:-1], -1)
    return joined(low, row_parts(codes >> 4, 2), scales ^ 0x80, d)


def iq4_xs(q: QTensor) -> Any:
    """d, upper two bits of eight scales, their lower four, nibbles of each 32 as in IQ4_NL."""
    rows, codes = q.shape[0], codes_of(q, SUPER)
    scales, d = nested(q.scale, rows, 8)
    high = (scales >> 4).astype(np.uint16) << np.arange(0, 16, 2, dtype=np.uint16)
    upper = np.bitwise_or.reduce(high, axis=-1, keepdims=True).view(np.uint8)
    lower = (scales[..., 0::2] & 15) | (scales[..., 1::2] << 4)
    packed = nibbles(codes.reshape(*codes.shape[:-1], 8, 32)).reshape(*codes.shape[:-1], -1)
    return joined(d, upper, lower, packed)
