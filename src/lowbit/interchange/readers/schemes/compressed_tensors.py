"""compressed-tensors checkpoints (llm-compressor, vLLM): see `layouts/compressed.py` for the packed tensors.

What a layer is stored as is told by its tensors; the group of `config_groups` that its name belongs to tells the rest: symmetric or
not, the size of groups, and how the inputs are stored while the model runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import SourceError
from lowbit.formats import Format, QTensor, parse_format
from lowbit.formats.blocks import Block
from lowbit.formats.format import Offset
from lowbit.formats.grids import Fp8Grid, IntGrid
from lowbit.interchange.layouts.compressed import signed_codes, unpack_weight, unpack_zero_points
from lowbit.interchange.readers.quantized import Checkpoint, QuantizedCheckpoint, QuantizedWeight, ReadPart, scheme
from lowbit.interchange.readers.schemes.activations import carried
from lowbit.interchange.readers.schemes.parts import (
    by_group,
    check_shape,
    check_type,
    groups_of,
    in_order,
    qtensor,
    store_of,
)
from lowbit.interchange.tensors import TensorSpec

BY_ORDER = "actorder put its columns into groups that are not consecutive"
_EXTRA = ("weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale", "input_scale", "input_zero_point",
           "input_global_scale")  # fmt: skip
_CACHE = re.compile(r"\.(k_scale|v_scale|k_zero_point|v_zero_point|q_scale|output_scale|output_zero_point)$")


@scheme("compressed-tensors")
def compressed_tensors(checkpoint: Checkpoint) -> QuantizedCheckpoint:
    """Every module with a `weight_scale`."""
    section = checkpoint.section
    sparsity = section.get("sparsity_config")
    kind = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    if kind not in (None, "dense"):
        raise SourceError(
            f"{checkpoint.where}: its weights are stored sparsely ({kind}), which lowbit cannot read; decompress it with "
            "compressed-tensors, or give the original float model"
        )
    groups = [g for g in _groups(section) if isinstance(g.get("weights"), Mapping)]
    weights, unused = {}, [name for name in checkpoint.tensors if _CACHE.search(name)]
    for module in checkpoint.modules("weight_scale"):
        found = _layer(checkpoint, module, _group_of(groups, module, checkpoint))
        extra = [n for leaf in _EXTRA if (n := f"{module}.{leaf}") in checkpoint.tensors]
        if found is None:  # "dense": float weights that were rounded to levels but not stored as codes
            unused += [f"{module}.weight_scale", *extra]
        else:
            weights[f"{module}.weight"] = found
    bits = sorted({f"{g['weights'].get('type', 'int')}{g['weights'].get('num_bits', 8)}" for g in groups})
    return QuantizedCheckpoint(
        weights, f"compressed-tensors, {section.get('format')}, {' and '.join(bits)}", tuple(unused)
    )


def _groups(section: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groups = section.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping):
            yield group


def _group_of(groups: list[Mapping[str, Any]], module: str, checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The group that a module belongs to: by its name, else by a pattern, else by its class, which here is a linear layer."""

    def rank(group: Mapping[str, Any]) -> int:
        best = 3
        for target in group.get("targets") or ():
            if target == module:
                best = min(best, 0)
            elif str(target).startswith("re:"):
                try:
                    best = min(best, 1) if re.match(str(target)[3:], module) else best
                except re.error:
                    continue
            elif "." not in str(target):
                best = min(best, 2)
        return best

    ranked = sorted((g for g in groups if rank(g) < 3), key=rank)
    if not ranked:
        checkpoint.refuse(f"{module}.weight_scale", "belongs to a module that no config_groups of config.json names")
    return ranked[0]


def _layer(checkpoint: Checkpoint, module: str, group: Mapping[str, Any]) -> QuantizedWeight | None:
    """What the tensors of a module stand for; None where its weight is a float one."""
    args, scale = group["weights"], checkpoint.spec(f"{module}.weight_scale")
    packed = f"{module}.weight_packed"
    if packed in checkpoint.tensors:
        spec = checkpoint.tensors[packed]
        if len(spec.shape) != 2 or spec.dtype not in (torch.int32, torch.uint8):
            checkpoint.refuse(packed, f"is {spec.dtype} of the shape {list(spec.shape)}, not packed words of a matrix")
        read = _words if spec.dtype == torch.int32 else _fp4
        found = read(checkpoint, module, args, spec, scale)
    else:
        spec = checkpoint.spec(f"{module}.weight")
        if spec.dtype not in (torch.int8, torch.float8_e4m3fn):
            return None
        if len(spec.shape) != 2:
            checkpoint.refuse(spec.name, f"has the shape {list(spec.shape)} and is no matrix")
        found = _plain(checkpoint, module, args, spec, scale)
    return carried(checkpoint, module, group.get("input_activations"), found)


def _bits(checkpoint: Checkpoint, module: str, args: Mapping[str, Any]) -> int:
    bits = args.get("num_bits", 8)
    if type(bits) is not int or not 1 <= bits <= 8:
        checkpoint.refuse(f"{module}.weight_scale", f"belongs to weights of num_bits={bits!r}, and 1 to 8 can be read")
    return bits


def _block(checkpoint: Checkpoint, args: Mapping[str, Any], scale: TensorSpec, shape: tuple[int, ...]) -> Block:
    """The block that shares a scale, checked against how many there are."""
    rows, cols = shape
    strategy, size = args.get("strategy"), args.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "tensor":
        check_shape(checkpoint, scale.name, (), (1,), (1, 1))
        return Block(-1, -1)
    if strategy == "channel":
        check_shape(checkpoint, scale.name, (rows, 1), (rows,))
        return Block(1, -1)
    if strategy == "block":
        structure = args.get("block_structure")
        if not (
            isinstance(structure, list) and len(structure) == 2 and all(type(n) is int and n > 0 for n in structure)
        ):
            checkpoint.refuse(scale.name, f"belongs to blocks of block_structure={structure!r}, which are none")
        check_shape(checkpoint, scale.name, (-(-rows // structure[0]), -(-cols // structure[1])))
        return Block(structure[0], structure[1])
    if strategy not in ("group", "tensor_group") or type(size) is not int:
        checkpoint.refuse(scale.name, f"belongs to strategy={strategy!r}, group_size={size!r}, which is not known here")
    if len(scale.shape) != 2 or scale.shape[0] != rows:
        checkpoint.refuse(scale.name, f"has the shape {list(scale.shape)}, and the weight has {rows} rows")
    return groups_of(checkpoint, scale.name, cols, scale.shape[1], size)


def _words(
    checkpoint: Checkpoint, module: str, args: Mapping[str, Any], spec: TensorSpec, scale: TensorSpec
) -> QuantizedWeight:
    """pack-quantized: integers of 1 to 8 bits in words of 32."""
    bits, symmetric = _bits(checkpoint, module, args), args.get("symmetric", True) is not False
    shape = (spec.shape[0], _width(checkpoint, module, bits, args, scale))
    names = [spec.name, scale.name]
    zeros = f"{module}.weight_zero_point"
    if not symmetric:
        check_type(checkpoint, zeros, torch.int32)
    fmt = Format(
        IntGrid(bits, is_signed=symmetric), _block(checkpoint, args, scale, shape), store_of(checkpoint, scale),
        None if symmetric else Offset("zero", "grid"),
    )  # fmt: skip
    order = f"{module}.weight_g_idx"
    if order in checkpoint.tensors:
        check_shape(checkpoint, order, (shape[1],))

    def unpacked(read: ReadPart) -> tuple[Tensor, Tensor, Tensor | None]:
        try:
            codes = unpack_weight(read(spec.name), bits, shape[1])
            return codes, read(scale.name), None if symmetric else unpack_zero_points(read(zeros), bits, shape[0])
        except ValueError as error:
            checkpoint.refuse(spec.name, str(error))

    def quantized(read: ReadPart) -> QTensor:
        codes, scales, found = unpacked(read)
        if found is not None and found.shape != scales.reshape(shape[0], -1).shape:
            checkpoint.refuse(
                zeros, f"has zero-points for {list(found.shape)} blocks, and there are {list(scales.shape)}"
            )
        return qtensor(fmt, codes, scales, found)

    def values(read: ReadPart) -> Tensor:
        codes, scales, found = unpacked(read)
        middle = torch.full_like(scales, 1 << (bits - 1), dtype=torch.uint8) if found is None else found
        return by_group(checkpoint, order, codes, scales, middle, read)

    parts = _parts(checkpoint, module, *names)
    if order in parts and not in_order(checkpoint, order, shape[1] if fmt.block.cols == -1 else fmt.block.cols):
        return QuantizedWeight(shape, parts, values=values, why=BY_ORDER)
    return QuantizedWeight(shape, parts, fmt, quantized)


def _width(checkpoint: Checkpoint, module: str, bits: int, args: Mapping[str, Any], scale: TensorSpec) -> int:
    """Inputs of a packed layer: as `weight_shape` says, or from headers alone what its groups or words say."""
    name = f"{module}.weight_shape"
    words = checkpoint.spec(f"{module}.weight_packed").shape[1]
    if checkpoint.read is None or name not in checkpoint.tensors:
        size = args.get("group_size")
        if args.get("strategy") == "group" and type(size) is int and len(scale.shape) == 2:
            return scale.shape[1] * size
        return words * 32 // bits
    check_shape(checkpoint, name, (2,))
    found = checkpoint.read(name).tolist()
    if found[0] != checkpoint.spec(f"{module}.weight_packed").shape[0] or not 0 < found[1] <= 32 * max(words, 1):
        checkpoint.refuse(name, f"says {found}, which {words} words a row do not hold")
    return int(found[1])


def _fp4(
    checkpoint: Checkpoint, module: str, args: Mapping[str, Any], spec: TensorSpec, scale: TensorSpec
) -> QuantizedWeight:
    """nvfp4-pack-quantized and mxfp4-pack-quantized."""
    if args.get("type") != "float" or args.get("num_bits") != 4:
        checkpoint.refuse(
            spec.name, f"is packed in bytes, and weights of {args.get('type')}{args.get('num_bits')} cannot be read so"
        )
    shape = (spec.shape[0], 2 * spec.shape[1])
    whole = f"{module}.weight_global_scale"
    fmt = parse_format("nvfp4" if whole in checkpoint.tensors else "mxfp4")
    check_type(
        checkpoint,
        scale.name,
        *((torch.float8_e4m3fn,) if whole in checkpoint.tensors else (torch.uint8, torch.float8_e8m0fnu)),
    )
    check_shape(checkpoint, scale.name, (shape[0], -(-shape[1] // fmt.block.cols)))
    if whole in checkpoint.tensors:
        check_shape(checkpoint, whole, (1,), ())

    def quantized(read: ReadPart) -> QTensor:
        codes, scales = read(spec.name), read(scale.name).view(torch.uint8)
        if whole not in checkpoint.tensors:
            return QTensor(fmt, shape, codes, scales.reshape(fmt.block.counts(shape)))
        inner = fmt.scale
        assert isinstance(inner, Format)
        times = read(whole).to(torch.float32).reciprocal().reshape(1, 1, 1)
        return QTensor(fmt, shape, codes, QTensor(inner, (scales.numel(),), scales.reshape(-1), times))

    return QuantizedWeight(shape, _parts(checkpoint, module, spec.name, scale.name), fmt, quantized)


def _plain(
    checkpoint: Checkpoint, module: str, args: Mapping[str, Any], spec: TensorSpec, scale: TensorSpec
) -> QuantizedWeight:
    """int-quantized, float-quantized, mxfp8-quantized and naive-quantized: one number of 8 bits a weight."""
    bits, symmetric = _bits(checkpoint, module, args), args.get("symmetric", True) is not False
    block = _block(checkpoint, args, scale, spec.shape)
    store = "e8m0" if scale.dtype == torch.uint8 else store_of(checkpoint, scale)
    parts = _parts(checkpoint, module, spec.name, scale.name)
    if spec.dtype == torch.float8_e4m3fn:
        fmt = Format(Fp8Grid(3), block, store)
        return QuantizedWeight(
            spec.shape, parts, fmt, lambda read: qtensor(fmt, read(spec.name).view(torch.uint8), read(scale.name))
        )
    zeros = f"{module}.weight_zero_point"
    fmt = Format(IntGrid(bits), block, store, None if symmetric else Offset("zero", "grid"))
    if not symmetric:
        check_type(checkpoint, zeros, torch.int8, torch.int32, torch.int64)
        check_shape(checkpoint, zeros, scale.shape)

    def quantized(read: ReadPart) -> QTensor:
        try:
            codes = signed_codes(read(spec.name), bits)
        except ValueError as error:
            checkpoint.refuse(spec.name, str(error))
        try:
            found = None if symmetric else signed_codes(read(zeros), bits)
        except ValueError as error:
            checkpoint.refuse(zeros, str(error))
        return qtensor(fmt, codes, read(scale.name), found)

    return QuantizedWeight(spec.shape, parts, fmt, quantized)


def _parts(checkpoint: Checkpoint, module: str, *names: str) -> tuple[str, ...]:
    """What the layer is made of, and its extra tensors."""
    return (*names, *(n for leaf in _EXTRA if (n := f"{module}.{leaf}") in checkpoint.tensors))
