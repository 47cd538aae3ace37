"""How compressed-tensors says that inputs of a layer are stored in few bits, as `Inputs`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import parse_inputs
from lowbit.interchange.readers.quantized import Checkpoint, QuantizedWeight, ReadPart


def carried(checkpoint: Checkpoint, module: str, args: Any, weight: QuantizedWeight) -> QuantizedWeight:
    """`weight` with its inputs as `input_activations` has them, where lowbit has the same; else with a note."""
    if not isinstance(args, Mapping):
        return weight
    text, dynamic = _text(args), args.get("dynamic")
    try:
        inputs = parse_inputs(text)
    except FormatError:
        return replace(weight, note=f"its inputs ({text}) stay float")
    if not inputs.static:
        return (
            replace(weight, inputs=inputs)
            if dynamic is True
            else replace(weight, note=f"its inputs ({text}) stay float")
        )
    names = {"input_scale": f"{module}.input_scale", "input_offset": f"{module}.input_zero_point"}
    wanted = inputs.parts(weight.shape[-1])
    if any(names[part] not in checkpoint.tensors for part in wanted):
        return replace(weight, note=f"its inputs ({text}) stay float: they were never calibrated")

    def parts(read: ReadPart) -> dict[str, Tensor]:
        return {part: read(names[part]).to(torch.float32).reshape(size) for part, (_, size) in wanted.items()}

    return replace(weight, inputs=inputs, input_parts=parts)


def _text(args: Mapping[str, Any]) -> str:
    """The text form of such inputs, which need not be one that lowbit has."""
    bits, strategy = args.get("num_bits", 8), args.get("strategy") or "tensor"
    grid = f"int{bits}" if args.get("type", "int") == "int" else {8: "e4m3", 4: "e2m1"}.get(bits, f"float{bits}")
    block = f"g{args.get('group_size')}" if strategy in ("group", "tensor_group") else str(strategy)
    words = [grid, block]
    if args.get("symmetric", True) is False:
        words.append("zero=int32")
    if args.get("scale_dtype") in ("torch.uint8", "uint8"):
        words.append("s=e8m0")
    if args.get("dynamic") is False:
        words.append("static")
    if args.get("dynamic") == "local":
        words.append("local")
    return ":".join(words)
