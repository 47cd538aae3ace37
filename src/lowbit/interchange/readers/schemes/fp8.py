"""FP8 checkpoints as DeepSeek and transformers store them (`fp8`), and those of FBGEMM (`fbgemm_fp8`).

`weight` float8_e4m3fn [out, in]; `weight_scale_inv` [ceil(out / 128), ceil(in / 128)], or one number, float32 or powers of two
(e8m0); FBGEMM: `weight_scale` [out, 1]. w = weight * scale, whatever "inv" suggests. Experts that are stored as one
tensor have the same names and a dimension in front: `experts.gate_up_proj`, `experts.gate_up_proj_scale_inv`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lowbit.formats import Format, QTensor, parse_inputs
from lowbit.formats.blocks import Block
from lowbit.formats.grids import Fp8Grid
from lowbit.formats.inputs import Inputs
from lowbit.interchange.readers.quantized import Checkpoint, QuantizedCheckpoint, QuantizedWeight, ReadPart, scheme
from lowbit.interchange.readers.schemes.parts import qtensor, store_of
from lowbit.interchange.tensors import TensorSpec

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("_scale_inv", "_scale")


@scheme("fp8", "fbgemm_fp8")
def fp8(checkpoint: Checkpoint) -> QuantizedCheckpoint:
    """Every tensor of 8-bit floats."""
    section = checkpoint.section
    size = section.get("weight_block_size")
    weights = {}
    for name, spec in checkpoint.tensors.items():
        if spec.dtype in _FLOAT8 and not name.endswith(_SCALES):
            weights[name] = _weight(checkpoint, spec, size)
    blocks = f", blocks of {' x '.join(map(str, size))}" if _is_size(size) and size else ""
    return QuantizedCheckpoint(weights, f"{section['quant_method']}{blocks}")


def _is_size(size: Any) -> bool:
    return isinstance(size, (list, tuple)) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)


def _weight(checkpoint: Checkpoint, spec: TensorSpec, size: Any) -> QuantizedWeight:
    names = [n for end in _SCALES if (n := spec.name + end) in checkpoint.tensors]
    if not names:
        checkpoint.refuse(
            spec.name, f"has no {spec.name + _SCALES[0]!r} beside it, without which its numbers mean nothing"
        )
    if len(spec.shape) not in (2, 3):
        checkpoint.refuse(spec.name, f"has the shape {list(spec.shape)} and is no matrix or stack of matrices")
    scale = checkpoint.spec(names[0])
    block = _block(checkpoint, spec, scale, size)
    fmt = Format(Fp8Grid(3 if spec.dtype == _FLOAT8[0] else 2), block, store_of(checkpoint, scale))
    layer = spec.name.removesuffix(".weight")
    names_of_scales = (f"{layer}.activation_scale", f"{layer}.input_scale")
    input_scales = [n for n in names_of_scales if n in checkpoint.tensors]
    inputs, note = _inputs(checkpoint, size if block.rows != -1 else None, input_scales, len(spec.shape) == 2)
    return QuantizedWeight(
        spec.shape, (spec.name, scale.name, *input_scales), fmt, partial(_quantized, spec.name, scale.name, fmt),
        note=note, inputs=inputs,
        input_parts=None if inputs is None or not inputs.static else lambda read: {
            "input_scale": read(input_scales[0]).to(torch.float32).reshape(1, 1)
        },
    )  # fmt: skip


def _block(checkpoint: Checkpoint, spec: TensorSpec, scale: TensorSpec, size: Any) -> Block:
    """What shares a scale, told by how many scales there are."""
    candidates = [Block(1, -1), Block(-1, -1)]
    if _is_size(size):
        candidates.insert(0, Block(size[0], size[1]))
    found = next((block for block in candidates if scale.shape in _shapes(block, spec.shape)), None)
    if found is None:
        checkpoint.refuse(
            scale.name, f"has the shape {list(scale.shape)}, which weight_block_size={size!r} does not give for {list(spec.shape)}"
        )  # fmt: skip
    return found


def _shapes(block: Block, shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The shapes that the scales of such blocks may have."""
    counts = block.counts(shape)
    found: set[tuple[int, ...]] = {counts if len(shape) == 3 else counts[1:]}
    if len(shape) == 2 and block.cols == -1:
        found |= {(shape[0],)} if block.rows == 1 else {(), (1,)}
    return found


def _inputs(checkpoint: Checkpoint, size: Any, input_scales: list[str], matrix: bool) -> tuple[Inputs | None, str]:
    """How inputs are stored: in groups as wide as a block, in one static scale, or for each token."""
    if not matrix:
        return None, ""
    kind = checkpoint.section.get("activation_scheme", "dynamic")
    if kind == "static" and input_scales:
        return parse_inputs("e4m3:tensor:static"), ""
    if kind != "dynamic":
        return None, f"its inputs ({kind}) stay float"
    return parse_inputs(f"e4m3:g{size[1]}" if _is_size(size) else "e4m3:token"), ""


def _quantized(weight: str, scale: str, fmt: Format, read: ReadPart) -> QTensor:
    return qtensor(fmt, read(weight).view(torch.uint8), read(scale))
