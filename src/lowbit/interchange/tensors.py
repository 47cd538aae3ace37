"""A tensor before its values are read: what any file says of it, and what becomes of it in a quantized model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lowbit.formats import Format, Inputs

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Kind = Literal["linear", "conv1d", "embedding", "head", "experts", "other"]
MULTIPLIED: tuple[Kind, ...] = ("linear", "conv1d", "experts")  # what inputs are multiplied with, heads apart
Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> (dtype, shape)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor before it is read: its name in the model, shape and stored dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of a model and what it becomes, or in a folder of lowbit became. The entry of a plan, and what exporters look at.

    name        as the model of transformers calls it
    shape       as the module has it
    kind        see the inventory
    dtype       of a kept one; of a quantized one what computing is done in
    transposed  the module keeps [..., in, out]
    format      None: kept as it is
    keep        why it is kept, where that is known
    inputs      how the inputs of this weight are stored in few bits while the model runs, or None
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    dtype: torch.dtype
    transposed: bool = False
    format: Format | None = None
    keep: str | None = None
    inputs: Inputs | None = None

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def reading_bytes(self) -> int:
        """Bytes that reading it takes: a fused stack of experts, and the parts that it is made of."""
        return self.bytes_before * (2 if self.kind == "experts" else 1)

    @property
    def out_in(self) -> tuple[int, ...]:
        """The shape as [..., out, in], also where the module keeps [..., in, out]."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that is stored: a quantized tensor is [..., out, in], a kept one as the module has it."""
        return self.shape if self.format is None else self.out_in

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

    def input_parts(self) -> Specs:
        """Name -> (dtype, shape) of what is stored of the inputs."""
        return {} if self.inputs is None else self.inputs.parts(self.stored_shape[-1])

    def stored(self) -> Specs:
        """Name in the file -> (dtype, shape) of everything stored for this tensor."""
        if self.format is None:
            return {self.name: (self.dtype, self.shape)}
        parts = self.format.parts(self.stored_shape) | self.input_parts()
        return {f"{self.name}.{part}": spec for part, spec in parts.items()}


@dataclass(frozen=True)
class Contents:
    """A quantized model before its values are read, planned or written: what an exporter is asked to hold.

    config   the transformers config, without what lowbit adds to it; None for a module that has none
    tensors  by name, in the model's order; a tied alias is not listed
    tied     alias -> the name of the tensor that it shares
    """

    label: str
    recipe: str
    config: PretrainedConfig | None
    tensors: Mapping[str, TensorPlan]
    tied: Mapping[str, str]
