"""AWQ checkpoints of AutoAWQ and GPTQModel in the "gemm" layout: see `layouts/awq.py`."""

from __future__ import annotations

from functools import partial

import torch

from lowbit.errors import SourceError
from lowbit.formats import QTensor
from lowbit.formats.format import Format, Offset
from lowbit.formats.grids import IntGrid
from lowbit.interchange.layouts.awq import BITS, ORDER, unpack_awq
from lowbit.interchange.readers.quantized import Checkpoint, QuantizedCheckpoint, QuantizedWeight, ReadPart, scheme
from lowbit.interchange.readers.schemes.parts import check_shape, check_type, groups_of, qtensor, store_of


@scheme("awq")
def awq(checkpoint: Checkpoint) -> QuantizedCheckpoint:
    """Every module with a `qweight`."""
    section = checkpoint.section
    version = str(section.get("version") or section.get("checkpoint_format") or section.get("format") or "gemm").lower()
    bits, size = checkpoint.whole("bits", BITS), checkpoint.whole("group_size", -1)
    if version != "gemm" or bits != BITS:
        raise SourceError(
            f"{checkpoint.where}: an AWQ model of {bits} bits in the {version!r} layout; lowbit reads {BITS} bits in the "
            "'gemm' layout: save it in that, or give the original float model"
        )
    if section.get("zero_point") is False:
        raise SourceError(
            f"{checkpoint.where}: an AWQ model without zero-points (zero_point=false), which the 'gemm' layout does not "
            "define; give the original float model"
        )
    weights = {f"{m}.weight": _layer(checkpoint, m, size) for m in checkpoint.modules("qweight")}
    return QuantizedCheckpoint(weights, f"awq, {bits} bits, {'one group a row' if size == -1 else f'groups of {size}'}")


def _layer(checkpoint: Checkpoint, module: str, size: int) -> QuantizedWeight:
    names = tuple(f"{module}.{leaf}" for leaf in ("qweight", "qzeros", "scales"))
    words = check_type(checkpoint, names[0], torch.int32)
    check_type(checkpoint, names[1], torch.int32)
    scales = checkpoint.spec(names[2])
    if len(words.shape) != 2 or len(scales.shape) != 2:
        checkpoint.refuse(names[0], "is no matrix of words with a matrix of scales beside it")
    width, out, groups = words.shape[0], words.shape[1] * len(ORDER), scales.shape[0]
    check_shape(checkpoint, names[2], (groups, out))
    check_shape(checkpoint, names[1], (groups, words.shape[1]))
    block = groups_of(checkpoint, names[2], width, groups, size)
    fmt = Format(IntGrid(BITS, is_signed=False), block, store_of(checkpoint, scales), Offset("zero", "grid"))
    return QuantizedWeight((out, width), names, fmt, partial(_quantized, names, fmt))


def _quantized(names: tuple[str, ...], fmt: Format, read: ReadPart) -> QTensor:
    codes, zeros, scales = unpack_awq(*(read(name) for name in names))
    return qtensor(fmt, codes, scales, zeros)
