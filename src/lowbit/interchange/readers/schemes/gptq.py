"""GPTQ checkpoints of AutoGPTQ, GPTQModel and auto-round: see `layouts/gptq.py` for the tensors.

Bits and groups are read from the shapes of each layer, so that layers of other widths than config.json names (GPTQModel's
`dynamic`) need no rules. Where `desc_act` put columns into groups in the order of their activation, no format of lowbit has
these groups: the layer is read as values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import SourceError
from lowbit.formats import QTensor
from lowbit.formats.format import Format, Offset
from lowbit.formats.grids import IntGrid
from lowbit.interchange.layouts.gptq import unpack_gptq
from lowbit.interchange.readers.quantized import Checkpoint, QuantizedCheckpoint, QuantizedWeight, ReadPart, scheme
from lowbit.interchange.readers.schemes.parts import (
    by_group,
    check_shape,
    check_type,
    groups_of,
    in_order,
    qtensor,
    store_of,
)

_VERSIONS = {"gptq": 1, "gptq_v2": 2}
_BITS = (2, 3, 4, 8)
BY_ORDER = "desc_act put its columns into groups that are not consecutive"


@scheme("gptq", "auto-round", "intel/auto-round")
def gptq(checkpoint: Checkpoint) -> QuantizedCheckpoint:
    """Every module with a `qweight`."""
    section = checkpoint.section
    if section.get("quant_method") == "gptq":
        kind = str(section.get("checkpoint_format") or section.get("format") or "gptq")
    else:
        kind = str(section.get("packing_format") or "auto_round:auto_gptq").rpartition(":")[2].removeprefix("auto_")
    if kind not in _VERSIONS:
        raise SourceError(
            f"{checkpoint.where}: its layers are laid out as {kind!r}, and lowbit reads {', '.join(_VERSIONS)}; "
            "save it again in one of these, or give the original float model"
        )
    bits, size = checkpoint.whole("bits"), checkpoint.whole("group_size", -1)
    weights = {f"{m}.weight": _layer(checkpoint, m, _VERSIONS[kind]) for m in checkpoint.modules("qweight")}
    groups = "one group a row" if size == -1 else f"groups of {size}"
    order = ", columns by activation" if checkpoint.flag("desc_act", False) else ""
    # Of the tensors: the config may say otherwise, and `dynamic` for some.
    found = sorted({w.format.grid.bits for w in weights.values() if w.format and isinstance(w.format.grid, IntGrid)})
    width = " and ".join(map(str, found or [bits]))
    return QuantizedCheckpoint(weights, f"{section['quant_method']}, {width} bits, {groups}{order}")


def _layer(checkpoint: Checkpoint, module: str, version: int) -> QuantizedWeight:
    settings = _settings(checkpoint, module)
    names = [f"{module}.{leaf}" for leaf in ("qweight", "qzeros", "scales")]
    words, scales = check_type(checkpoint, names[0], torch.int32), checkpoint.spec(names[2])
    check_type(checkpoint, names[1], torch.int32)
    if len(words.shape) != 2 or len(scales.shape) != 2:
        checkpoint.refuse(names[0], "is no matrix of words with a matrix of scales beside it")
    (rows, out), groups = words.shape, scales.shape[0]
    check_shape(checkpoint, names[2], (groups, out))
    bits = _bits(checkpoint, module, settings)
    width = rows * 32 // bits
    if rows * 32 % bits:
        checkpoint.refuse(names[0], f"has {rows} rows of words, which hold no whole number of {bits}-bit codes")
    symmetric = checkpoint.flag("sym", True, settings)
    block = groups_of(checkpoint, names[2], width, groups, checkpoint.whole("group_size", -1, settings))
    fmt = Format(
        IntGrid(bits, is_signed=symmetric), block, store_of(checkpoint, scales),
        None if symmetric else Offset("zero", "grid"),
    )  # fmt: skip
    order = f"{module}.g_idx"
    parts = (*names, order) if order in checkpoint.tensors else tuple(names)
    if order in parts:
        check_shape(checkpoint, order, (width,))
    size = width if block.cols == -1 else block.cols
    unpacked = partial(_unpacked, checkpoint, names, bits, version)
    if order in parts and checkpoint.flag("desc_act", False, settings) and not in_order(checkpoint, order, size):
        values = partial(_values, checkpoint, unpacked, order)
        return QuantizedWeight((out, width), parts, values=values, why=BY_ORDER)
    read = partial(_quantized, checkpoint, names, unpacked, fmt, order if order in parts else None, size)
    return QuantizedWeight((out, width), parts, fmt, read)


def _settings(checkpoint: Checkpoint, module: str) -> dict[str, Any]:
    """The section as it is for one layer, by GPTQModel's `dynamic`: regular expressions, "+:" in front or none."""
    merged, dynamic = dict(checkpoint.section), checkpoint.section.get("dynamic") or {}
    try:
        for pattern, changes in dynamic.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
                merged |= changes
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise SourceError(
            f"{checkpoint.where}: quantization_config says dynamic={dynamic!r:.80}, which are no settings by regular expression "
            f"({error}); correct config.json"
        ) from error
    return merged


def _bits(checkpoint: Checkpoint, module: str, settings: Mapping[str, Any]) -> int:
    """Bits of a code: those of config.json where the shapes agree with them, else the only ones that do."""
    rows = checkpoint.spec(f"{module}.qweight").shape[0]
    groups, out = checkpoint.spec(f"{module}.scales").shape
    zeros, order = checkpoint.spec(f"{module}.qzeros").shape, checkpoint.tensors.get(f"{module}.g_idx")

    def agrees(bits: int) -> bool:
        width = rows * 32 // bits if order is None else order.shape[0]
        return zeros == (groups, -(-out * bits // 32)) and rows == -(-width * bits // 32)

    possible = [bits for bits in _BITS if agrees(bits)]
    said = settings.get("bits")
    if said not in possible and len(possible) != 1:
        checkpoint.refuse(
            f"{module}.qzeros", f"has the shape {list(zeros)}, which {said} bits for {out} outputs in {groups} groups do not give; "
            f"GPTQ layers have {', '.join(map(str, _BITS))} bits",
        )  # fmt: skip
    return int(said) if said in possible else possible[0]


Unpack = Callable[[ReadPart], tuple[Tensor, Tensor, Tensor]]


def _unpacked(
    checkpoint: Checkpoint, names: list[str], bits: int, version: int, read: ReadPart
) -> tuple[Tensor, Tensor, Tensor]:
    qweight, qzeros, scales = (read(name) for name in names)
    try:
        return unpack_gptq(qweight, qzeros, scales, bits, version=version)
    except ValueError as error:
        checkpoint.refuse(names[0], str(error))


def _quantized(
    checkpoint: Checkpoint, names: list[str], unpacked: Unpack, fmt: Format, order: str | None, size: int, read: ReadPart
) -> QTensor:  # fmt: skip
    codes, zeros, scales = unpacked(read)
    if order is not None and not in_order(checkpoint, order, size):
        checkpoint.refuse(order, "has groups that are not consecutive, and config.json says desc_act=false")
    if fmt.offset is not None:
        return qtensor(fmt, codes, scales, zeros)
    if bool((zeros != fmt.grid.cardinality // 2).any()):
        checkpoint.refuse(names[1], "has zero-points off the middle, and config.json says sym=true")
    return qtensor(fmt, codes, scales)


def _values(checkpoint: Checkpoint, unpacked: Unpack, order: str, read: ReadPart) -> Tensor:
    codes, zeros, scales = unpacked(read)
    return by_group(checkpoint, order, codes, scales, zeros, read)
