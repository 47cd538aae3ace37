"""ggml's block types of 32 weights: the parts of a QTensor put in the order of bytes that ggml reads.

Each packer takes a 2-D QTensor [rows, cols] of its format, cols a multiple of the block, and returns uint8
[rows, bytes of a row]. Nothing is rounded: codes, scales and minima are moved. Layouts: `ggml-common.h`, block_q4_0 to
block_iq4_nl and block_mxfp4; llama.cpp's `gguf.quants.dequantize` is the reader that the tests hold them to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from lowbit.formats import QTensor

Packer = Callable[[QTensor], Any]


def codes_of(q: QTensor, block: int) -> Any:
    """uint8 [rows, blocks, block]."""
    rows, cols = q.shape
    return q.unpacked().numpy().reshape(rows, cols // block, block)


def raw(part: Any, rows: int) -> Any:
    """The bytes of per-block values, uint8 [rows, blocks, bytes]."""
    assert isinstance(part, Tensor)
    values = part.numpy().reshape(rows, -1, 1)
    return values.view(np.uint8)


def nibbles(codes: Any) -> Any:
    """[..., 32] -> [..., 16]: byte j holds element j below and element j + 16 above."""
    return codes[..., :16] | (codes[..., 16:] << 4)


def joined(*parts: Any) -> Any:
    """Blocks from their parts [rows, blocks, n], one after the other: [rows, bytes of a row]."""
    blocks = np.concatenate(parts, axis=-1)
    return np.ascontiguousarray(blocks.reshape(len(blocks), -1))


def four_bits(q: QTensor) -> Any:
    """Q4_0, IQ4_NL and MXFP4: scale, nibbles. A level of -8 is code 0; the others use the order of their tables."""
    return joined(raw(q.scale, q.shape[0]), nibbles(codes_of(q, 32)))


def four_bits_and_minimum(q: QTensor) -> Any:
    """Q4_1: scale, minimum, nibbles; w = d q + m."""
    rows = q.shape[0]
    return joined(raw(q.scale, rows), raw(q.offset, rows), nibbles(codes_of(q, 32)))


def five_bits(q: QTensor) -> Any:
    """Q5_0, and Q5_1 with a minimum: scale, then bit 4 of the 32 codes as one little-endian word, then nibbles."""
    rows, codes = q.shape[0], codes_of(q, 32)
    heads = [raw(q.scale, rows)] + ([] if q.offset is None else [raw(q.offset, rows)])
    return joined(*heads, np.packbits(codes >> 4, axis=-1, bitorder="little"), nibbles(codes & 15))


def eight_bits(q: QTensor) -> Any:
    """Q8_0: scale, 32 signed bytes. Our code 0 is level -128."""
    return joined(raw(q.scale, q.shape[0]), codes_of(q, 32) ^ 0x80)
