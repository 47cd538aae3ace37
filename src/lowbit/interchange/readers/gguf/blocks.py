"""Tensors of a GGUF file as stored weights: which blocks have a format of lowbit with the same values."""

from __future__ import annotations

from functools import partial
from math import prod

import torch

from lowbit.formats import Format, QTensor, parse_format
from lowbit.interchange.layouts.gguf import FORMATS, UNPACK
from lowbit.interchange.readers.quantized import QuantizedWeight, ReadPart
from lowbit.interchange.rows import from_row_parts

_FLOATS = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")


def type_name(ggml_type: int) -> str:
    """The name of a ggml type, such as "Q4_0"."""
    from gguf import GGMLQuantizationType

    return str(GGMLQuantizationType(ggml_type).name)


def is_quantized(ggml_type: int) -> bool:
    """Whether a type has blocks, and not one number for each weight."""
    return type_name(ggml_type) not in _FLOATS


def float_type(ggml_type: int) -> torch.dtype:
    """The torch type of a ggml type without blocks, float32 for any other."""
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(type_name(ggml_type), torch.float32)


def stored_weight(name: str, ggml_type: int, shape: tuple[int, ...]) -> QuantizedWeight:
    """The tensor `name` of a file, in the layout of the file. Its part is read as uint8 [rows, bytes of a row]."""
    kind = type_name(ggml_type)
    if kind not in FORMATS or len(shape) < 2:
        return QuantizedWeight(shape, (name,), why=f"no format of lowbit has the levels of {kind}")
    fmt = parse_format(FORMATS[kind])
    return QuantizedWeight(shape, (name,), fmt, partial(_quantized, name, kind, fmt, shape))


def _quantized(name: str, kind: str, fmt: Format, shape: tuple[int, ...], read: ReadPart) -> QTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    row_parts = UNPACK[kind](read(name).reshape(-1, size))
    rows = prod(shape[:-1])
    return from_row_parts(fmt, shape, {name: part.reshape(rows, -1) for name, part in row_parts.items()})
