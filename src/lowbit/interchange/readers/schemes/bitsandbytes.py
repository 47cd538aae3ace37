"""bitsandbytes checkpoints: nf4 and fp4 with or without double quantization, and int8 of LLM.int8.

4 bits: `weight` uint8 [out * in / 2, 1], the first of two codes in the high nibble; blocks of 64 (or another size) run over the
flat weight; `weight.absmax` a scale for each, float32, or with double quantization 8-bit codes into `nested_quant_map`,
times `nested_absmax` for each 256, plus an offset. `weight.quant_map` holds the levels and `weight.quant_state.
bitsandbytes__nf4` a JSON object with the rest. 8 bits: `weight` int8 [out, in], `SCB` float32 [out], w = weight * SCB / 127.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import SourceError
from lowbit.formats import Format, QTensor, parse_inputs
from lowbit.formats.blocks import Block
from lowbit.formats.grids import IntGrid
from lowbit.formats.named_grids import parse_grid
from lowbit.interchange.layouts.compressed import signed_codes
from lowbit.interchange.layouts.nibbles import swap_nibbles
from lowbit.interchange.readers.quantized import Checkpoint, QuantizedCheckpoint, QuantizedWeight, ReadPart, scheme
from lowbit.interchange.readers.schemes.parts import check_shape, check_type, qtensor

_GRIDS = {"nf4": "nf4", "fp4": "bnb_fp4"}
_STATE = ".weight.quant_state.bitsandbytes__"
_STATE_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_MOST = 1 << 16  # bytes of a state that is still JSON and not a mistake


@scheme("bitsandbytes")
def bitsandbytes(checkpoint: Checkpoint) -> QuantizedCheckpoint:
    """Every module with a state of 4 bits, or with an `SCB`."""
    weights, kinds = {}, set()
    for name in checkpoint.tensors:
        module, found, kind = name.partition(_STATE)
        if found:
            weights[f"{module}.weight"] = _four_bits(checkpoint, module, kind, name)
            kinds.add(kind)
    for module in checkpoint.modules("SCB"):
        weights[f"{module}.weight"] = _eight_bits(checkpoint, module)
        kinds.add("int8")
    return QuantizedCheckpoint(weights, f"bitsandbytes, {' and '.join(sorted(kinds))}")


@dataclass(frozen=True)
class _State:
    """What the JSON of a 4-bit weight says."""

    shape: tuple[int, ...]
    size: int
    nested_size: int = 0
    nested_offset: float = 0.0


def _four_bits(checkpoint: Checkpoint, module: str, kind: str, name: str) -> QuantizedWeight:
    weight = f"{module}.weight"
    if kind not in _GRIDS:
        checkpoint.refuse(name, f"is of the kind {kind!r}, and {' and '.join(_GRIDS)} can be read")
    if checkpoint.read is None:
        raise SourceError(
            f"{checkpoint.where}: shapes of bitsandbytes weights are in its tensors, not in the headers; "
            "download the model and give its folder"
        )
    state = _state(checkpoint, name, checkpoint.read)
    count = math.prod(state.shape)
    spec, blocks = checkpoint.spec(weight), -(-count // state.size)
    if math.prod(spec.shape) * spec.dtype.itemsize != -(-count // 2):
        checkpoint.refuse(
            weight, f"has {math.prod(spec.shape)} x {spec.dtype}, which do not hold {list(state.shape)} codes of 4 bits"
        )
    check_shape(checkpoint, f"{weight}.absmax", (blocks,))
    check_shape(checkpoint, f"{weight}.quant_map", (16,))
    nested = checkpoint.spec(f"{weight}.absmax").dtype == torch.uint8
    if nested:
        if not state.nested_size:
            checkpoint.refuse(name, "lacks nested_blocksize, and the scales beside it are quantized")
        check_shape(checkpoint, f"{weight}.nested_absmax", (-(-blocks // state.nested_size),))
        check_shape(checkpoint, f"{weight}.nested_quant_map", (256,))
    else:
        check_type(checkpoint, f"{weight}.absmax", torch.float32)
    parts = (weight, name, *(n for leaf in _STATE_PARTS if (n := f"{weight}.{leaf}") in checkpoint.tensors))
    fmt = Format(parse_grid(_GRIDS[kind]), Block(1, state.size), "fp32")
    scales = partial(_scales, weight, state, nested)
    why = ""
    if len(state.shape) != 2 or state.shape[1] % state.size:
        why = f"its blocks of {state.size} run over the ends of rows of {state.shape[-1]}"
    elif not torch.equal(checkpoint.read(f"{weight}.quant_map").to(torch.float32), fmt.grid.levels):
        why = f"its levels are not those of {fmt.grid}"
    if not why:
        return QuantizedWeight(state.shape, parts, fmt, partial(_quantized, weight, state, fmt, scales))
    return QuantizedWeight(state.shape, parts, values=partial(_values, weight, state, scales), why=why)


def _state(checkpoint: Checkpoint, name: str, read: ReadPart) -> _State:
    spec = checkpoint.spec(name)
    if spec.dtype != torch.uint8 or len(spec.shape) != 1 or not 0 < spec.shape[0] < _MOST:
        checkpoint.refuse(name, f"is {spec.dtype} {list(spec.shape)} and no text of JSON")
    try:
        found: Any = json.loads(bytes(read(name).tolist()))
        if not isinstance(found, Mapping):
            raise ValueError("no object")
        shape = found["shape"]
        sizes = (*shape, found["blocksize"], found.get("nested_blocksize", 1))
        if not shape or any(type(n) is not int or not 0 < n < 1 << 31 for n in sizes):
            raise ValueError(f"sizes {sizes}")
        offset = float(found.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        checkpoint.refuse(name, f"is no JSON that describes a quantized weight ({error})")
    return _State(tuple(shape), found["blocksize"], int(found.get("nested_blocksize", 0)), offset)


def _scales(weight: str, state: _State, nested: bool, read: ReadPart) -> Tensor:
    """float32, one for each block of the flat weight."""
    kept = read(f"{weight}.absmax")
    if not nested:
        return kept
    level = read(f"{weight}.nested_quant_map").to(torch.float32)[kept.to(torch.int64)]
    scale = read(f"{weight}.nested_absmax").to(torch.float32).repeat_interleave(state.nested_size)[: len(level)]
    return level.mul_(scale).add_(state.nested_offset)


def _bytes(weight: str, read: ReadPart) -> Tensor:
    return read(weight).reshape(-1).view(torch.uint8)


def _quantized(weight: str, state: _State, fmt: Format, scales: Any, read: ReadPart) -> QTensor:
    codes = swap_nibbles(_bytes(weight, read)).view(fmt.parts(state.shape)["codes"][1])
    return QTensor(fmt, state.shape, codes, scales(read).view(fmt.block.counts(state.shape)))


def _values(weight: str, state: _State, scales: Any, read: ReadPart) -> Tensor:
    count, levels = math.prod(state.shape), read(f"{weight}.quant_map").to(torch.float32)
    packed = _bytes(weight, read)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:count]
    return levels[codes.long()].mul_(scales(read).repeat_interleave(state.size)[:count]).view(state.shape)


def _eight_bits(checkpoint: Checkpoint, module: str) -> QuantizedWeight:
    weight, scale = check_type(checkpoint, f"{module}.weight", torch.int8), f"{module}.SCB"
    if len(weight.shape) != 2:
        checkpoint.refuse(weight.name, f"has the shape {list(weight.shape)} and is no matrix")
    check_shape(checkpoint, scale, (weight.shape[0],))
    check_type(checkpoint, scale, torch.float32)
    kind = f"{module}.weight_format"
    if kind in checkpoint.tensors and checkpoint.read is not None and checkpoint.read(kind).any():
        checkpoint.refuse(kind, "says that the weight is tiled for one kind of GPU")
    fmt = Format(IntGrid(8), Block(1, -1), "fp32")
    threshold = checkpoint.section.get("llm_int8_threshold", 6.0)
    outliers = f":outliers={threshold:g}" if isinstance(threshold, (int, float)) and threshold > 0 else ""

    def quantized(read: ReadPart) -> QTensor:
        return qtensor(fmt, signed_codes(read(weight.name), 8), read(scale) / 127)

    parts = (weight.name, scale, *((kind,) if kind in checkpoint.tensors else ()))
    return QuantizedWeight(weight.shape, parts, fmt, quantized, inputs=parse_inputs(f"int8:token{outliers}"))
