"""What of a weight is packed, and which weights are packed as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.kernels.layout import Codes, Floats, can_join

if TYPE_CHECKING:
    import lowbit._core as _core


@dataclass(frozen=True, eq=False)
class Inputs:
    """How activations are rounded before a weight: the core's `ActivationSpec`; segment 0: as suits the weight."""

    bits: int = 15
    per_token: bool = False
    static_scale: float = 0.0
    divisor: Tensor | None = None
    segment: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        divisor = None if self.divisor is None else self.divisor.numpy().tobytes()
        return self.bits, self.per_token, self.static_scale, divisor, self.segment

    def spec(self, core: Any) -> _core.ActivationSpec:
        """The same as the core has it."""
        return core.ActivationSpec(
            bits=self.bits, per_token=self.per_token, static_scale=self.static_scale,
            divisor=None if self.divisor is None else self.divisor.numpy(),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class KernelWeight:
    """A weight as the kernels read it, what rounding its levels left, where that is to be added, and its inputs."""

    value: Codes | Floats
    inputs: Inputs
    residual: Codes | None = None

    def part(self, start: int, stop: int) -> KernelWeight:
        """Some of its rows."""
        residual = None if self.residual is None else self.residual.part(start, stop)
        return KernelWeight(self.value.part(start, stop), self.inputs, residual)


def halved(dense: Tensor, divisor: Tensor | None) -> Tensor:
    """The weight in float16, in float32 where that would lose bits of a row or overflow: 2^-14 is its smallest normal.

    divisor: of its inputs, which the columns take over.
    """
    if divisor is not None:
        dense = dense / divisor
    half = dense.to(torch.float16)
    off = torch.linalg.vector_norm(half.float() - dense, dim=-1)
    exact = off <= 2.0**-10 * torch.linalg.vector_norm(dense, dim=-1)  # False where it overflows
    return half if bool(exact.all()) else dense


def alike(found: list[KernelWeight], paired: bool) -> bool:
    """Whether these can be packed as one."""
    same = len({s.inputs.key for s in found}) == 1 and len({s.residual is None for s in found}) == 1
    return same and can_join([s.value for s in found], paired)  # type: ignore[arg-type]


def joined(biases: list[Tensor | None], rows: list[int]) -> Tensor | None:
    """Biases of weights one after another; None where no weight has one."""
    if all(b is None for b in biases):
        return None
    return torch.cat([torch.zeros(n) if b is None else b for b, n in zip(biases, rows, strict=True)])


def alternated(biases: list[Tensor | None]) -> Tensor | None:
    """Biases of a pair in the order of its tiles of 16."""
    if all(b is None for b in biases):
        return None
    size = next(len(b) for b in biases if b is not None)
    both = [torch.zeros(size) if b is None else b for b in biases]
    return torch.stack([b.view(-1, 16) for b in both], 1).reshape(-1)
