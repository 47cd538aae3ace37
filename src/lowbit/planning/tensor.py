"""What one tensor of a model becomes: the entry of a plan."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.formats import Format, Inputs

SLAB = 1 << 22  # elements of a weight that are in float32 at a time
MULTIPLIED = ("linear", "conv1d", "experts")  # kinds of the matrices that inputs are multiplied with, heads apart


@dataclass(frozen=True)
class TensorPlan:
    """One tensor: what it is and what it becomes. `format` None: kept as it is, for the reason `keep`.

    `inputs`: how the inputs of this weight are stored in few bits while the model runs, or None.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    dtype: torch.dtype
    transposed: bool
    format: Format | None
    keep: str | None
    inputs: Inputs | None = None

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that is quantized: [..., out, in] also where the module keeps [..., in, out]."""
        if self.format is None or not self.transposed:
            return self.shape
        return (*self.shape[:-2], self.shape[-1], self.shape[-2])

    @property
    def is_multiplied(self) -> bool:
        """Whether it is quantized and inputs are multiplied with it, which calibration sees."""
        return self.format is not None and self.kind in MULTIPLIED

    def as_rows(self, weight: Tensor) -> Tensor:
        """[..., out, in], a view of the weight as the module keeps it."""
        return weight.transpose(-1, -2) if self.transposed else weight

    def as_module(self, rows: Tensor) -> Tensor:
        """The weight as the module keeps it, contiguous where it is not [..., out, in] there."""
        return rows.transpose(-1, -2).contiguous() if self.transposed else rows

    @property
    def bytes_before(self) -> int:
        return self.count * self.dtype.itemsize

    @property
    def bytes_after(self) -> int:
        return sum(dtype.itemsize * math.prod(size) for dtype, size in self.stored().values())

    def input_parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of what is stored of the inputs."""
        return {} if self.inputs is None else self.inputs.parts(self.stored_shape[-1])

    def stored(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name in the file -> (dtype, shape) of everything stored for this tensor."""
        if self.format is None:
            return {self.name: (self.dtype, self.shape)}
        parts = self.format.parts(self.stored_shape) | self.input_parts()
        return {f"{self.name}.{part}": spec for part, spec in parts.items()}


def by_rows(fmt: Format, shape: tuple[int, ...]) -> bool:
    """Whether a weight can be quantized some rows (2-D) or matrices (3-D) at a time with the same result."""
    if len(shape) < 2 or any(isinstance(s, Format) for s in (fmt.scale, fmt.offset.store if fmt.offset else None)):
        return False
    alone = len(shape) > 2 or (fmt.block.rows == 1 and (fmt.codebook is None or fmt.codebook.rows == 1))
    # Every stored part must keep its rows, which packed ones only do where a row fills whole bytes.
    return alone and all(len(size) >= 2 for _, size in fmt.parts(shape).values())


def has_inputs(t: TensorPlan) -> bool:
    """Whether the inputs of a tensor can be in few bits: experts index their stacks, which the int8 product does not
    serve; embeddings are looked up, not multiplied."""
    return t.format is not None and t.kind in ("linear", "conv1d")
