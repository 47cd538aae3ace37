"""One weight to its stored form: checked, cut into slabs that bound the memory, solved, and measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import FormatError, WeightError
from lowbit.formats import QTensor
from lowbit.pipeline.plan import SLAB, TensorPlan, by_rows
from lowbit.pipeline.recipe import Recipe


@dataclass(frozen=True)
class Solved:
    """What a weight became: its stored tensors by file name, and |w - w_q| / |w| (0 for a kept tensor)."""

    plan: TensorPlan
    stored: dict[str, Tensor]
    error: float

    def qtensor(self) -> QTensor | None:
        """The quantized tensor, or None where the weight was kept."""
        if self.plan.format is None:
            return None
        parts = {name[len(self.plan.name) + 1 :]: t for name, t in self.stored.items()}
        return QTensor.from_parts(self.plan.format, self.plan.stored_shape, parts)


@torch.no_grad()
def solve(plan: TensorPlan, weight: Tensor, recipe: Recipe, device: torch.device | str = "cpu") -> Solved:
    """Quantize one tensor as planned. WeightError naming it when it has a NaN or an infinity."""
    fmt = plan.format
    if fmt is None:
        return Solved(plan, {plan.name: weight}, 0.0)
    if plan.transposed:
        weight = weight.transpose(-1, -2)
    solver, fit = recipe.solver_for(fmt), recipe.fit_for(fmt)
    pieces: list[dict[str, Tensor]] = []
    error = norm = 0.0
    for slab in _slabs(weight, plan):
        x = slab.to(device=device, dtype=torch.float32).contiguous()
        check_finite(x, plan.name)
        try:
            q = solver(x, fmt, fit, None)
        except FormatError as problem:
            raise WeightError(f"tensor {plan.name!r} does not fit {fmt}: {problem}") from None
        norm += float(x.double().square().sum()) if x.numel() < 1 << 16 else float(torch.linalg.vector_norm(x)) ** 2
        error += float(torch.linalg.vector_norm(x.sub(q.dequantize()))) ** 2
        pieces.append({name: part.cpu() for name, part in q.parts().items()})
    stored = {f"{plan.name}.{name}": _joined(name, [p[name] for p in pieces], weight.dim()) for name in pieces[0]}
    # Six digits: the last ones of a float32 sum depend on how many threads shared it.
    return Solved(plan, stored, float(f"{(error / norm) ** 0.5:.6g}") if norm else 0.0)


def _slabs(weight: Tensor, plan: TensorPlan) -> list[Tensor]:
    """Views of whole rows or whole matrices of about SLAB elements; the weight itself where it must stay whole."""
    shape = tuple(weight.shape)
    if plan.format is None or weight.numel() <= SLAB or not by_rows(plan.format, shape):
        return [weight]
    return list(weight.split(max(1, SLAB // max(1, weight[0].numel()))))


def _joined(name: str, parts: list[Tensor], dims: int) -> Tensor:
    """Codes are stacked along the first dimension, per-block parts [batch, rows, ...] along rows (2-D) or batch (3-D)."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim=0 if name == "codes" or dims > 2 else 1)


def check_finite(x: Tensor, name: str) -> None:
    if x.numel() and not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
        nans, infs = int(x.isnan().sum()), int(x.isinf().sum())
        raise WeightError(
            f"tensor {name!r} has {nans} NaN and {infs} infinite values and cannot be quantized; "
            f"the checkpoint is damaged, or keep this tensor with a recipe ending in ,{name}=keep"
        )
