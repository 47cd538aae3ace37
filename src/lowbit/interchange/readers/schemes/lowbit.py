"""Folders that lowbit wrote: `quantization_config` names every packed tensor with its format (see `interchange/hf/quantizer.py`)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from lowbit.formats import Format, Inputs, QTensor
from lowbit.interchange.checks.section import Packed, check_parts, read_section
from lowbit.interchange.readers.quantized import Checkpoint, QuantizedCheckpoint, QuantizedWeight, ReadPart, scheme


@scheme("lowbit")
def lowbit(checkpoint: Checkpoint) -> QuantizedCheckpoint:
    """Every tensor that config.json lists."""
    section = read_section(checkpoint.section, f"{checkpoint.where}/config.json")
    check_parts(section, {n: (s.dtype, s.shape) for n, s in checkpoint.tensors.items()}, checkpoint.where)
    weights = {name: _weight(packed) for name, packed in section.tensors.items()}
    return QuantizedCheckpoint(weights, f"lowbit, {section.recipe or 'no recipe'}")


def _weight(packed: Packed) -> QuantizedWeight:
    name, fmt, shape, inputs = packed.name, packed.format, packed.shape, packed.inputs
    quantized = partial(_quantized, name, fmt, shape)
    return QuantizedWeight(
        shape, tuple(f"{name}.{part}" for part in packed.parts()), fmt, quantized, partial(_values, name, quantized, inputs),
        inputs=inputs, input_parts=partial(_beside, name, tuple(packed.input_parts())), transposed=packed.transposed,
    )  # fmt: skip


def _quantized(name: str, fmt: Format, shape: tuple[int, ...], read: ReadPart) -> QTensor:
    return QTensor.from_parts(fmt, shape, {part: read(f"{name}.{part}") for part in fmt.parts(shape)})


def _beside(name: str, parts: tuple[str, ...], read: ReadPart) -> dict[str, Tensor]:
    return {part: read(f"{name}.{part}") for part in parts}


def _values(name: str, quantized: Any, inputs: Inputs | None, read: ReadPart) -> Tensor:
    """The weight for inputs that are neither divided nor rounded."""
    dense: Tensor = quantized(read).dequantize()
    return dense / read(f"{name}.input_divisor") if inputs is not None and inputs.divisor else dense
