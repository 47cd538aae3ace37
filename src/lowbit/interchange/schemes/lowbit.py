"""Folders that lowbit wrote: `quantization_config` names every packed tensor with its format (see `interchange/hf.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from lowbit.errors import FormatError, SourceError
from lowbit.formats import Format, Inputs, QTensor, parse_format, parse_inputs
from lowbit.interchange.stored import Checkpoint, ReadPart, StoredModel, StoredWeight, scheme


@scheme("lowbit")
def lowbit(checkpoint: Checkpoint) -> StoredModel:
    """Every tensor that config.json lists."""
    listed = checkpoint.section.get("tensors")
    if not isinstance(listed, Mapping):
        raise SourceError(f"{checkpoint.where}: config.json does not list the packed tensors; copy the folder again")
    weights = {str(name): _weight(checkpoint, str(name), entry) for name, entry in listed.items()}
    return StoredModel(weights, f"lowbit, {checkpoint.section.get('recipe')}")


def _weight(checkpoint: Checkpoint, name: str, entry: Any) -> StoredWeight:
    try:
        fmt, shape = parse_format(str(entry["format"])), tuple(int(n) for n in entry["shape"])
        inputs = parse_inputs(str(entry["inputs"])) if "inputs" in entry else None
        beside = {} if inputs is None else inputs.parts(shape[-1])
        wanted = fmt.parts(shape) | beside
    except (KeyError, TypeError, ValueError, IndexError, FormatError) as error:
        raise SourceError(
            f"{checkpoint.where}: config.json says {entry!r} of {name!r}, which is no format and shape ({error})"
        ) from None
    for part, (dtype, size) in wanted.items():
        spec = checkpoint.spec(f"{name}.{part}")
        if spec.dtype != dtype or spec.shape != size:
            checkpoint.refuse(spec.name, f"is {spec.dtype} {list(spec.shape)} and not {dtype} {list(size)}")
    quantized = partial(_quantized, name, fmt, shape)
    return StoredWeight(
        shape, tuple(f"{name}.{part}" for part in wanted), fmt, quantized, partial(_values, name, quantized, inputs),
        inputs=inputs, input_parts=partial(_beside, name, tuple(beside)), transposed=bool(entry.get("transposed")),
    )  # fmt: skip


def _quantized(name: str, fmt: Format, shape: tuple[int, ...], read: ReadPart) -> QTensor:
    return QTensor.from_parts(fmt, shape, {part: read(f"{name}.{part}") for part in fmt.parts(shape)})


def _beside(name: str, parts: tuple[str, ...], read: ReadPart) -> dict[str, Tensor]:
    return {part: read(f"{name}.{part}") for part in parts}


def _values(name: str, quantized: Any, inputs: Inputs | None, read: ReadPart) -> Tensor:
    """The weight for inputs that are neither divided nor rounded."""
    dense: Tensor = quantized(read).dequantize()
    return dense / read(f"{name}.input_divisor") if inputs is not None and inputs.divisor else dense
