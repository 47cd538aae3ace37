"""One weight to its stored form: checked, cut into slabs that bound the memory, solved, and measured."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError, WeightError
from lowbit.formats import Format, QTensor
from lowbit.interchange.tensors import TensorPlan
from lowbit.kernels.bfloat16 import multiplies_bfloat16
from lowbit.planning.tensor import SLAB, by_rows
from lowbit.recipes.recipe import Recipe
from lowbit.solvers.found import Found
from lowbit.solvers.hessian import quadratic
from lowbit.solvers.products import bfloat16_products
from lowbit.solvers.ranging import Lost, in_range, ranged
from lowbit.solvers.stats import Stats
from lowbit.weights.finite import check_finite, check_kept


@dataclass(frozen=True)
class LayerLoss:
    """What calibration knows of a weight's error: |x (W - W_q)'| / |x W'|, of round-to-nearest and of the result.

    `tokens`: how many inputs it was measured on. `damp`: the damping that the solver took, where it takes one.
    """

    nearest: float
    final: float
    tokens: int
    damp: float | None = None


@dataclass(frozen=True)
class Solved:
    """What a weight became: its stored tensors by file name, and |w - w_q| / |w| (0 for a kept tensor).

    `warning`: what a person has to know of it, where there is anything; `note`: what one may want to know.
    `tuned`: what a tuner of the whole model said of its work, where it changed this tensor. `exponent`: of its format,
    where the planned one has none (`solvers/ranging.py`).
    """

    plan: TensorPlan
    stored: dict[str, Tensor]
    error: float
    output: LayerLoss | None = None
    note: str = ""
    tuned: dict[str, Any] | None = None
    warning: str = ""
    exponent: int = 0

    @property
    def format(self) -> Format | None:
        """The planned format with the exponent that the values asked for."""
        return with_exponent(self.plan.format, self.exponent)

    def qtensor(self) -> QTensor | None:
        """The quantized tensor, or None where the weight was kept."""
        fmt = self.format
        if fmt is None:
            return None
        prefix = self.plan.name + "."
        parts = {part: self.stored[prefix + part] for part in fmt.parts(self.plan.stored_shape)}
        return QTensor.from_parts(fmt, self.plan.stored_shape, parts)

    def dense(self) -> Tensor | None:
        """The quantized weight expanded, as the module keeps it; None where it was kept."""
        q = self.qtensor()
        return None if q is None else self.plan.as_module(q.dequantize())


def with_exponent(fmt: Format | None, exponent: int) -> Format | None:
    """A planned format as it is stored; one whose recipe names an exponent has it already."""
    return fmt if fmt is None or not exponent else replace(fmt, exponent=exponent)


@torch.no_grad()
def solve(
    plan: TensorPlan, weight: Tensor, recipe: Recipe, device: torch.device | str = "cpu", stats: Stats | None = None,
    note: str = "",
) -> Solved:  # fmt: skip
    """Quantize one tensor as planned. WeightError naming it when it has a NaN or an infinity, which a kept one may
    have where the recipe keeps it by its name.

    Without `stats` a solver that needs them gives way to round-to-nearest.
    """
    if plan.format is None:
        return Solved(
            plan, {plan.name: weight}, 0.0, warning=check_kept(weight, plan.name, recipe, plan.keep == "buffer")
        )
    weight = plan.as_rows(weight)
    within = ranged(weight, plan.format)
    fmt = within.format
    solver, fit = recipe.solver_for(fmt, stats is not None), recipe.fit_for(fmt)
    slabs: list[dict[str, Tensor]] = []
    error = norm = 0.0
    lost = Lost()
    alone = not within.doubtful and weight.is_contiguous() and torch.device(device).type == "cpu"
    whole = solver.solve_in_core(weight.to(device=device), fmt, fit, stats) if alone else None
    if whole is not None and whole.squares is not None:  # in one go, without a copy in float32
        norm, error = whole.squares
        slabs.append(whole.weight.parts())
    for slab in _slabs(weight, plan) if not slabs else []:
        x = slab.to(device=device, dtype=torch.float32).contiguous()
        check_finite(x, plan.name)
        try:
            found = solver.solve(x, fmt, fit, stats)
        except FormatError as problem:
            raise WeightError(f"tensor {plan.name!r} does not fit {fmt}: {problem}") from None
        size, off = _squares(found, x)
        norm, error = norm + size, error + off
        if within.doubtful:
            lost.add(x, found.weight.dequantize(), fmt, (off / size) ** 0.5 if size else 0.0)
        slabs.append({name: part.cpu() for name, part in found.weight.parts().items()})
    stored = {f"{plan.name}.{name}": _joined(name, [part[name] for part in slabs], weight.dim()) for name in slabs[0]}
    return Solved(
        plan, stored, six_digits((error / norm) ** 0.5) if norm else 0.0, note=note, warning=lost.warning(fmt),
        exponent=fmt.exponent,
    )  # fmt: skip


def _squares(found: Found, x: Tensor) -> tuple[float, float]:
    """|x|^2 and |x - x_q|^2."""
    if found.squares is not None:
        return found.squares
    size = float(x.double().square().sum()) if x.numel() < 1 << 16 else float(torch.linalg.vector_norm(x)) ** 2
    return size, float(torch.linalg.vector_norm(x.sub(found.weight.dequantize()))) ** 2


@torch.no_grad()
def solve_group(
    plans: Sequence[TensorPlan], weights: Sequence[Tensor], recipe: Recipe, stats: Stats | dict[int, Stats] | None
) -> list[Solved]:
    """Quantize the weights that share one input, given its statistics (by expert for a stack of experts).

    Weights of one format are stacked and solved in one go, where rows do not depend on one another.
    """
    if stats is None:
        return [solve(p, w, recipe, note="no token of the calibration text came here") for p, w in zip(plans, weights)]
    if isinstance(stats, dict):
        return [_solve_experts(p, w, recipe, stats) for p, w in zip(plans, weights)]
    out: dict[str, Solved] = {}
    stored = [None if p.format is None else in_range(p.as_rows(w), p.format) for p, w in zip(plans, weights)]
    for fmt in dict.fromkeys(stored):
        same = [(p, w) for p, w, f in zip(plans, weights, stored) if f == fmt]
        alone = fmt is None or not all(by_rows(fmt, p.stored_shape) for p, _ in same)
        for part in [[one] for one in same] if alone else [same]:
            for solved in _solve_stacked([p for p, _ in part], [w for _, w in part], fmt, recipe, stats):
                out[solved.plan.name] = solved
    return [out[p.name] for p in plans]


def _solve_stacked(
    plans: Sequence[TensorPlan], weights: Sequence[Tensor], fmt: Format | None, recipe: Recipe, stats: Stats
) -> list[Solved]:
    """Weights of one format, rows under rows. `fmt`: the planned one, with the exponent that all of them take."""
    if fmt is None:
        return [solve(plan, weight, recipe) for plan, weight in zip(plans, weights)]
    rows = [p.as_rows(w).to(torch.float32) for p, w in zip(plans, weights)]
    for plan, x in zip(plans, rows):
        check_finite(x, plan.name)
    whole = torch.cat(rows) if len(rows) > 1 else rows[0].contiguous()
    solver, fit = recipe.solver_for(fmt, True), recipe.fit_for(fmt)
    try:
        found = solver.solve(whole, fmt, fit, stats)
    except FormatError as problem:
        raise WeightError(f"tensor {plans[0].name!r} does not fit {fmt}: {problem}") from None
    q, trace = found.weight, found.trace
    dense, out, begin = q.dequantize(), [], 0
    for plan, x in zip(plans, rows):
        part = slice(begin, begin + len(x))
        stored = {f"{plan.name}.{k}": _rows(k, v, part, len(rows) > 1) for k, v in q.parts().items()}
        error = x - dense[part]
        size = float(x.norm())
        # Sums over a whole weight, so that single products in bfloat16 are near enough.
        with bfloat16_products() if stats.half and multiplies_bfloat16() else nullcontext():
            signal, lost_signal = (quadratic(of, stats.second_moment) for of in (x, error))
        final = (lost_signal / signal) ** 0.5 if signal else 0.0
        # How far feedback lowered the error is known of the stack; each of its parts is given the same share.
        ratio = (trace.start / trace.end) ** 0.5 if trace is not None and trace.end > 0 else 1.0
        output = LayerLoss(
            six_digits(final * ratio), six_digits(final), stats.tokens, None if trace is None else trace.damp
        )
        off = six_digits(float(error.norm()) / size) if size else 0.0
        lost = Lost()
        lost.add(x, dense[part], fmt, off)
        out.append(Solved(plan, stored, off, output, warning=lost.warning(fmt), exponent=fmt.exponent))
        begin += len(x)
    return out


def _solve_experts(plan: TensorPlan, weight: Tensor, recipe: Recipe, stats: dict[int, Stats]) -> Solved:
    """A stack of experts [experts, ...]: each with its own statistics, shrunk towards those of all where it saw few tokens."""
    if plan.format is None or not by_rows(plan.format, plan.stored_shape):
        return solve(
            plan,
            weight,
            recipe,
            note="all experts share its scales, so that it was quantized without statistics of the inputs",
        )
    fmt = in_range(plan.as_rows(weight), plan.format)
    width = plan.stored_shape[-1]
    everything = _together(stats)
    found, few = [], 0
    for e in range(len(weight)):
        own = stats.get(e)
        if own is None or own.tokens < width:
            few += 1
            own = everything if own is None else own.blended(everything, width)
        one = TensorPlan(plan.name, tuple(weight[e].shape), "linear", plan.dtype, plan.transposed, fmt, None)
        found.extend(_solve_stacked([one], [weight[e]], fmt, recipe, own))
    stored = {}
    for name in found[0].stored:
        parts = [s.stored[name] for s in found]
        stored[name] = torch.stack(parts) if name.endswith(".codes") else torch.cat(parts)
    mean = sum(s.error for s in found) / len(found)
    outputs = [s.output for s in found if s.output is not None]
    output = LayerLoss(
        six_digits(sum(o.nearest for o in outputs) / len(outputs)),
        six_digits(sum(o.final for o in outputs) / len(outputs)), everything.tokens,
    )  # fmt: skip
    note = (
        f"{few} of {len(weight)} experts saw fewer than {width} tokens and also use the statistics of all experts"
        if few
        else ""
    )
    warning = next((f"{s.warning} (of expert {e})" for e, s in enumerate(found) if s.warning), "")
    return Solved(plan, stored, six_digits(mean), output, note, warning=warning, exponent=fmt.exponent)


def _together(stats: dict[int, Stats]) -> Stats:
    """The statistics of all experts' inputs together."""
    tokens = sum(s.tokens for s in stats.values())
    share = {e: s.tokens / max(1, tokens) for e, s in stats.items()}
    return Stats(
        tokens,
        torch.stack([s.second_moment * share[e] for e, s in stats.items()]).sum(0),
        torch.stack([s.absmax for s in stats.values()]).amax(0),
        torch.stack([s.mean_abs * share[e] for e, s in stats.items()]).sum(0),
    )


def six_digits(value: float) -> float:
    """The last digits of a float32 sum depend on how many threads shared it."""
    return float(f"{value:.6g}")


def _rows(name: str, part: Tensor, rows: slice, several: bool) -> Tensor:
    """Rows of a stored part: the first dimension of codes, the second of what is kept per block."""
    if not several:
        return part
    return (part[rows] if name == "codes" else part[:, rows]).contiguous()


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
