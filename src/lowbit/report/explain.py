"""Every step of a recipe's arithmetic on a small array or a few blocks of a tensor, as a value.

First each value on its own, as `quantize_tensor` stores it (`explain_blocks.py`); then, for methods that do more, the method
at work on a small weight and a few inputs (`at_work/`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.display import Displayed
from lowbit.errors import RecipeError, WeightError
from lowbit.formats import Format, QTensor, stores
from lowbit.measure.card import json_ready
from lowbit.recipes.recipe import Recipe
from lowbit.report.at_work.case import COLUMNS, CORNER, ROWS, SEED, Case, checked, made_up
from lowbit.report.at_work.inputs import show_inputs
from lowbit.report.at_work.trace import Registered, Trace, registered
from lowbit.report.bits import bits_text
from lowbit.report.explain_blocks import BlockSteps, blocks_of
from lowbit.report.explain_what import chosen, parse_array
from lowbit.report.formulas import Step, reading, rounding, scaled_heading
from lowbit.solvers import Call, fit_blocks
from lowbit.solvers.ranging import in_range

__all__ = ["BlockSteps", "Explanation", "explain", "parse_array"]

_BINS = 32


@dataclass(frozen=True, repr=False)
class Explanation(Displayed):
    """What a recipe does to one array: some blocks in every detail, the errors over all of it, and its methods at work.

    remarks   what is to be known of the array, the inputs and the recipe, a sentence each
    inputs    the rows of the inputs that the methods saw, None where none looks at any
    at_work   one trace for each method that does more than its formula says
    """

    label: str
    recipe: str
    format: Format
    fit: Call | None
    solver: Call
    shape: tuple[int, ...]
    block_count: int
    blocks: tuple[BlockSteps, ...]
    mean_error: float
    max_error: float
    rms_error: float
    relative_error: float
    bits_per_weight: float
    nbytes: int
    histogram: tuple[int, ...]
    histogram_after: tuple[int, ...]
    bits_from: str = ""
    remarks: tuple[str, ...] = ()
    inputs: tuple[tuple[float, ...], ...] | None = None
    at_work: tuple[Trace, ...] = ()

    def _brief(self) -> str:
        return f"{self.label}, {self.recipe}, relative error {self.relative_error:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        fmt, skip = self.format, ("blocks", "format", "fit", "solver", "at_work")
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skip}
        out |= {"format": str(fmt), "fit": None if self.fit is None else str(self.fit), "solver": str(self.solver)}
        out |= {"rounding": rounding(fmt), "scaled_is": scaled_heading(fmt), "reading": reading(fmt)}
        out["blocks"] = [
            {**dataclasses.asdict(b), "errors": b.errors, "steps": [_step(s) for s in b.steps]} for b in self.blocks
        ]
        out["at_work"] = [trace.to_dict() for trace in self.at_work]
        return json_ready(out)


def explain(
    what: Tensor | Sequence[Any] | str,
    recipe: str | Path | Format | Recipe | None = None,
    fmt: Format | None = None,
    *,
    inputs: Tensor | Sequence[Any] | str | None = None,
    label: str = "x",
    rows: int | None = None,
    elements: int = 64,
) -> Explanation:
    """Quantize `what` and note every step.

    `what`: a weight [out, in] (or a vector, or [n, out, in]) as a tensor, as lists or as text such as "[-0.3, 0, 0.1, 0.7]";
    "MODEL:TENSOR"; or, without a recipe, the name of a recipe or method, which is shown on an array of its own. `recipe`:
    w4 unless given. `inputs` [T, in]: a few inputs of the layer for methods that look at them; a made-up few otherwise,
    and the recipe is what it stands for with calibration text where they are given. `fmt` is the recipe's main format unless
    given. Details are kept of the first block of each of the first `rows` rows (of all blocks when None, 16 at most), and of
    `elements` values of each, and `label` names the array. WeightError for NaN, RecipeError for inputs that no method looks at.

    >>> found = lowbit.explain([-0.3, 0, 0.1, 0.7], "absmax")
    >>> found.blocks[0].codes
    (74, 128, 146, 255)
    """
    found = chosen(what, recipe, fmt, label=label, rows=rows, elements=elements)
    wanted, remarks = found.recipe, list(found.remarks)
    weight, fmt = found.weight.detach().to(torch.float32), found.format
    if not bool(weight.isfinite().all()):
        bad = int((~weight.isfinite()).sum())
        raise WeightError(
            f"{found.label}: {bad} of {weight.numel()} values are NaN or infinite, which cannot be quantized"
        )
    given = None if inputs is None else _inputs(inputs)
    if given is not None:
        wanted = wanted.calibrated()
        fmt = wanted.format if fmt == found.recipe.format else fmt
        if not (wanted.uses_calibration or wanted.transforms or wanted.stores_inputs):
            raise RecipeError(f"{wanted.title} looks at no inputs, so that those given change nothing; leave them out")
    elif wanted.calibrated() != wanted:
        remarks.append(
            f"With calibration text {wanted.name} is {wanted.calibrated()}, which `lowbit explain` shows too."
        )
    case = _case(weight, wanted, fmt, given, remarks)
    shown = _blocks(found.label, weight, wanted, fmt, found.rows, found.elements)
    corner = case is not None and case.weight.numel() < weight.numel()
    traces = () if case is None else tuple(_placed(trace, case.weight, corner) for trace in _traces(case))
    seen = case is not None and _looks_at_inputs(wanted, given)
    return dataclasses.replace(
        shown,
        remarks=tuple(remarks),
        inputs=tuple(map(tuple, case.inputs_float.tolist())) if case is not None and seen else None,
        at_work=traces,
    )


def _inputs(inputs: Tensor | Sequence[Any] | str) -> Tensor:
    if isinstance(inputs, str):
        return parse_array(inputs)
    return inputs if isinstance(inputs, Tensor) else torch.tensor(inputs, dtype=torch.float32)


def _looks_at_inputs(recipe: Recipe, given: Tensor | None) -> bool:
    return given is not None or bool(recipe.transforms or recipe.stores_inputs or recipe.needs_calibration)


def _case(weight: Tensor, recipe: Recipe, fmt: Format, given: Tensor | None, remarks: list[str]) -> Case | None:
    """The corner of the weight that methods are shown on, with inputs; None for a weight without values."""
    if not weight.numel():
        return None
    matrix = weight.reshape(-1, *weight.shape[-2:])[0] if weight.dim() > 1 else weight.reshape(1, -1)
    x = None if given is None else checked(given, matrix.shape[1])
    small = matrix[:ROWS, : COLUMNS if matrix.shape[1] <= COLUMNS else CORNER].contiguous()
    if small.shape != matrix.shape and _stages(recipe, fmt):
        remarks.append(
            f"The method is shown on the first {_count(len(small), 'row')} and {_count(small.shape[1], 'column')} of the weight, as a "
            "small weight of their own."
        )
    if x is None:
        x = made_up(small.shape[1])
        if _looks_at_inputs(recipe, given):
            remarks.append(
                f'The {len(x)} inputs x of the layer are made up (seed {SEED}); give your own with --inputs "[[...], [...]]".'
            )
    calibrated = given is not None or recipe.needs_calibration is not None
    return Case.of(small, x[:, : small.shape[1]].contiguous(), recipe, fmt, calibrated)


def _count(number: int, what: str) -> str:
    return f"{number} {what}s" if number != 1 else what


def _stages(recipe: Recipe, fmt: Format) -> list[Call]:
    """The methods of a recipe that have something to show, in the order in which they work."""
    needs = recipe.needs_calibration is not None
    fit = recipe.fit_for(fmt) if fmt.scale is not None else None
    calls = (*recipe.transforms, recipe.weighting, fit, recipe.solver_for(fmt, with_stats=needs), recipe.tuner)
    return [call for call in calls if call is not None and registered(call) is not None]


def _traces(case: Case) -> list[Trace]:
    """Every method in order, each on what the one before made of weight and inputs."""
    traces = []
    stages = _stages(case.recipe, case.wanted)
    for call in stages:
        found = registered(call)
        if found is None:
            continue
        if call.method.kind == "fit":
            traces += _fit_trace(case, call, stages, found)
            continue
        shown = found.show(case, call)
        if shown is not None:
            traces.append(shown.trace)
            case = shown.after
    last = show_inputs(case)
    return [*traces, last] if last is not None else traces


def _placed(trace: Trace, weight: Tensor, corner: bool) -> Trace:
    """The trace with what it is of: the corner of a larger weight, and errors of all its rows."""
    rows, columns = weight.shape
    if corner:
        first = f"the first {_count(rows, 'row')} and {_count(columns, 'column')}"
        trace = dataclasses.replace(trace, parts=(f"Of {_count(rows * columns, 'weight')}, {first}.", *trace.parts))
    if rows > 1 and trace.outcome is not None:
        measure = f"{trace.outcome.measure}, all {rows} rows"
        trace = dataclasses.replace(trace, outcome=dataclasses.replace(trace.outcome, measure=measure))
    return trace


def _fit_trace(case: Case, call: Call, stages: list[Call], found: Registered) -> list[Trace]:
    """The fit at work on the weights that the recipe's solver finds scales for."""
    said = ""
    solver = next((c for c in stages if c.method.kind == "solver"), None)
    by = None if solver is None else registered(solver)
    if solver is not None and by is not None and by.fitted is not None:
        case, said = by.fitted(case, solver)
    shown = found.show(case, call)
    if shown is None:
        return []
    return [dataclasses.replace(shown.trace, parts=(said, *shown.trace.parts)) if said else shown.trace]


def _blocks(label: str, weight: Tensor, recipe: Recipe, fmt: Format, rows: int | None, elements: int) -> Explanation:
    """Each value on its own, by the data-free part of the recipe."""
    fmt = in_range(weight, fmt)
    fit, solver = recipe.fit_for(fmt), recipe.solver_for(fmt)
    q: QTensor = solver(weight, fmt, fit)
    scale, offset = None, None
    if fmt.codebook is None:
        scale, offset = fit_blocks(stores.times_power(weight, -fmt.exponent), fmt.plain, fit)
        scale = stores.times_power(scale, fmt.exponent)
    after = q.dequantize()
    error = (after - weight).double()
    norm = float(weight.double().norm())
    reach = max(float(weight.abs().max()), float(after.abs().max()), 1e-30)
    return Explanation(
        label=label,
        recipe=recipe.title,
        format=fmt,
        fit=fit if fmt.scale is not None else None,
        solver=solver,
        shape=tuple(weight.shape),
        block_count=math.prod(fmt.block.counts(tuple(weight.shape))),
        blocks=tuple(blocks_of(weight, q, fit, scale, offset, after, rows, elements)),
        mean_error=float(error.abs().mean()),
        max_error=float(error.abs().max()),
        rms_error=float(error.square().mean().sqrt()),
        relative_error=float(error.norm()) / norm if norm else 0.0,
        bits_per_weight=q.bits_per_weight,
        nbytes=q.nbytes,
        histogram=_histogram(weight, reach),
        histogram_after=_histogram(after, reach),
        bits_from=bits_text(q),
    )


def _histogram(values: Tensor, reach: float) -> tuple[int, ...]:
    return tuple(int(n) for n in torch.histc(values, _BINS, -reach, reach).tolist())


def _step(step: Step) -> dict[str, Any]:
    return {**dataclasses.asdict(step), "text": str(step)}
