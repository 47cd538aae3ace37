"""What an export is compared by when it is read back: stored tensors as they are, and what inputs mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import Inputs
from lowbit.interchange.files.safetensors_reader import read_tensor
from lowbit.interchange.files.weights import entries_of


def tensors_of(folder: Path, names: set[str]) -> dict[str, Tensor]:
    """Tensors of a folder as they are stored."""
    return {name: read_tensor(*place) for name, place in entries_of(folder).items() if name in names}


def levels_of(inputs: Inputs, parts: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """What tells inputs apart from others, however they are written: levels, block, and the lowest value of static ones."""
    fmt = inputs.format
    if fmt is None:
        return (inputs.divisor,)
    lowest = fmt.grid.lo - parts.get("input_offset", torch.zeros(1)).reshape(-1)
    scale = parts["input_scale"].reshape(-1).tolist() if inputs.static else ()
    static = (scale, lowest.tolist()) if inputs.static else ()
    return fmt.grid.bits, fmt.grid.hi - fmt.grid.lo, fmt.offset is None, fmt.block, inputs.static, *static
