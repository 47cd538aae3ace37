"""MXFP4 as gpt-oss stores its experts: `gate_up_proj_blocks` uint8 [experts, out, in / 32, 16], the first of two codes in the
low nibble, and `gate_up_proj_scales` uint8 [experts, out, in / 32], exponents of powers of two. The model keeps [experts, in, out].
"""

from __future__ import annotations

from functools import partial

import torch

from lowbit.formats import Format, QTensor, parse_format
from lowbit.interchange.readers.quantized import Checkpoint, QuantizedCheckpoint, QuantizedWeight, ReadPart, scheme
from lowbit.interchange.readers.schemes.parts import check_shape, check_type

_BLOCKS, _SCALES = "_blocks", "_scales"


@scheme("mxfp4")
def mxfp4(checkpoint: Checkpoint) -> QuantizedCheckpoint:
    """Every tensor with blocks and scales."""
    fmt = parse_format("mxfp4")
    weights = {}
    for name, spec in checkpoint.tensors.items():
        if not name.endswith(_BLOCKS):
            continue
        base = name.removesuffix(_BLOCKS)
        check_type(checkpoint, name, torch.uint8)
        if len(spec.shape) < 3 or spec.shape[-1] != fmt.block.cols // 2:
            checkpoint.refuse(name, f"has the shape {list(spec.shape)}, which is no [..., out, in / 32, 16]")
        check_shape(checkpoint, base + _SCALES, spec.shape[:-1])
        check_type(checkpoint, base + _SCALES, torch.uint8, torch.float8_e8m0fnu)
        shape = (*spec.shape[:-2], spec.shape[-2] * fmt.block.cols)
        read = partial(_quantized, name, base + _SCALES, fmt, shape)
        weights[base] = QuantizedWeight(shape, (name, base + _SCALES), fmt, read, transposed=len(shape) == 3)
    return QuantizedCheckpoint(weights, "mxfp4, groups of 32")


def _quantized(blocks: str, scales: str, fmt: Format, shape: tuple[int, ...], read: ReadPart) -> QTensor:
    codes = read(blocks).reshape(fmt.parts(shape)["codes"][1])
    return QTensor(fmt, shape, codes, read(scales).view(torch.uint8).reshape(fmt.block.counts(shape)))
