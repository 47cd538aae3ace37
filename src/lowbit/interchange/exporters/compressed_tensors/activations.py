"""Inputs of linear layers in few bits: as compressed-tensors describes them, and which of them vLLM has kernels for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import Format, Inputs
from lowbit.formats.grids import IntGrid
from lowbit.interchange.exporters.compressed_tensors.scheme import Refusal, Spec, arguments


def refuses_inputs(inputs: Inputs | None, grid: str, *, offsets: bool, static: bool = True) -> Refusal | None:
    """Why inputs cannot be served beside weights that want `grid` (int8 or e4m3), or None.

    `offsets`: whether they may have a zero-point. `static`: whether the scale may be stored.
    """
    if inputs is None:
        return None
    word = "fp8" if grid == "e4m3" else grid
    nearest = f"a=minmax@{word}:tensor" if inputs.static and static else f"a={word}:token"
    if inputs.divisor:
        return Refusal(
            "divides its inputs by stored numbers, for which there is no place: use smooth only where a norm takes the "
            "division, or leave it out",
            nearest,
        )
    if inputs.outliers is not None:
        return Refusal("keeps columns of outliers in float, for which no program there has a kernel", nearest)
    fmt = inputs.format
    if fmt is None:
        return None
    if kind_of(fmt) != grid:
        return Refusal(f"has inputs in {fmt.grid} beside weights that go with {grid}", nearest)
    whole_range = isinstance(fmt.grid, IntGrid) and fmt.grid.narrow
    if whole_range or (fmt.offset is not None and (not offsets or fmt.offset.store != "grid")):
        return Refusal(f"has inputs {inputs}, whose range or offset has no place there", nearest)
    wanted = (-1, -1) if inputs.static else (1, -1)
    if (fmt.block.rows, fmt.block.cols) != wanted or (inputs.static and not static):
        return Refusal(f"has inputs {inputs}; a scale there is for one token, or stored and for all tokens", nearest)
    return None


def kind_of(fmt: Format) -> str:
    """The grid of inputs: int8 for both byte grids."""
    return "int8" if fmt.grid.name in ("int8", "uint8") else fmt.grid.name


def input_arguments(inputs: Inputs | None) -> dict[str, Any] | None:
    """The `input_activations` of a config group, for inputs that `refuses_inputs` has nothing against."""
    if inputs is None or inputs.format is None:
        return None
    kind = "int" if kind_of(inputs.format) == "int8" else "float"
    symmetric = inputs.format.offset is None
    if inputs.static:
        return arguments(8, kind, "tensor", symmetric)
    return arguments(8, kind, "token", symmetric, dynamic=True)


def input_spec(inputs: Inputs | None) -> Spec:
    """`input_scale` float32 [1] of static inputs, and `input_zero_point` int8 [1] where they have an offset."""
    if inputs is None or inputs.format is None or not inputs.static:
        return {}
    spec: Spec = {"input_scale": (torch.float32, (1,))}
    if inputs.format.offset is not None:
        spec["input_zero_point"] = (torch.int8, (1,))
    return spec


def pack_inputs(inputs: Inputs | None, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `input_spec` announces. The zero-point is on int8: 128 below that of uint8."""
    if not input_spec(inputs):
        return {}
    assert inputs is not None and inputs.format is not None
    packed = {"input_scale": parts["input_scale"].reshape(1)}
    if "input_offset" in parts:
        shift = 0 if inputs.format.grid.signed else 128
        packed["input_zero_point"] = (parts["input_offset"].reshape(1) - shift).to(torch.int8)
    return packed
