"""What several schemes share: names of stores, checks of shapes, a QTensor of unsigned codes."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats import QTensor
from lowbit.formats.blocks import Block
from lowbit.formats.format import Format
from lowbit.formats.packing import pack
from lowbit.interchange.readers.quantized import Checkpoint, ReadPart
from lowbit.interchange.tensors import TensorSpec

_STORES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float8_e8m0fnu: "e8m0",
    torch.float8_e4m3fn: "e4m3",
}  # fmt: skip


def store_of(checkpoint: Checkpoint, spec: TensorSpec) -> str:
    """How a scale of this type is stored. SourceError for a type that no scale has."""
    if spec.dtype not in _STORES:
        checkpoint.refuse(spec.name, f"is {spec.dtype}, which is no type of a scale")
    return _STORES[spec.dtype]


def check_shape(checkpoint: Checkpoint, name: str, *allowed: tuple[int, ...]) -> TensorSpec:
    """The spec of a tensor that must have one of these shapes. SourceError otherwise."""
    spec = checkpoint.spec(name)
    if spec.shape not in allowed:
        checkpoint.refuse(
            name, f"has the shape {list(spec.shape)} and not {' or '.join(str(list(s)) for s in allowed)}"
        )
    return spec


def check_type(checkpoint: Checkpoint, name: str, *allowed: torch.dtype) -> TensorSpec:
    """The spec of a tensor that must have one of these types. SourceError otherwise."""
    spec = checkpoint.spec(name)
    if spec.dtype not in allowed:
        checkpoint.refuse(name, f"is {spec.dtype} and not {' or '.join(map(str, allowed))}")
    return spec


def groups_of(checkpoint: Checkpoint, name: str, width: int, count: int, size: int) -> Block:
    """The block of `count` scales over `width` inputs, `size` to a group (-1: all). SourceError where they do not agree."""
    if width > 0 and count == 1 and (size == -1 or size > width):
        return Block(1, -1)
    if size <= 0 or -(-width // size) != count:
        checkpoint.refuse(name, f"has {count} groups for {width} inputs, which groups of {size} do not give")
    return Block(1, size)


def qtensor(fmt: Format, codes: Tensor, scale: Tensor, zeros: Tensor | None = None) -> QTensor:
    """Of uint8 codes [..., out, in], stored scales and, for a zero-point on the grid, its uint8 codes."""
    shape = tuple(codes.shape)
    counts = fmt.block.counts(shape)
    scale = scale.view(torch.uint8) if scale.dtype.itemsize == 1 else scale
    offset = None if zeros is None else pack(zeros.reshape(counts).contiguous(), fmt.grid.cardinality)
    packed = pack(codes, fmt.grid.cardinality)
    return QTensor(fmt, shape, packed, scale.reshape(counts).contiguous(), offset)


def in_order(checkpoint: Checkpoint, order: str, size: int) -> bool:
    """Whether the group of each input (`order`, "g_idx") is i // size; False where only headers are at hand."""
    if checkpoint.read is None:
        return False
    found = checkpoint.read(order).to(torch.int64)
    return bool((found == torch.arange(len(found)) // size).all())


def by_group(
    checkpoint: Checkpoint, order: str, codes: Tensor, scales: Tensor, zeros: Tensor, read: ReadPart
) -> Tensor:
    """w[o, i] = scale[o, g[i]] * (code[o, i] - zero[o, g[i]]) for the group g = `order` of each input, float32."""
    group = read(order).to(torch.int64)
    if group.numel() and not 0 <= int(group.min()) <= int(group.max()) < scales.shape[1]:
        checkpoint.refuse(order, f"names groups beyond the {scales.shape[1]} that there are")
    return codes.to(torch.float32).sub_(zeros.to(torch.float32)[:, group]).mul_(scales.to(torch.float32)[:, group])
