"""Every step of the arithmetic on a small array or a few blocks of a tensor, as a value.

Nothing is computed a second way: scale and offset come from the fit, codes from the solver, values from
`QTensor.dequantize()`; only `scaled`, the value just before rounding, is worked out here to be shown.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.display import Displayed
from lowbit.errors import WeightError
from lowbit.formats import Format, QTensor
from lowbit.formats.blocks import as_matrices
from lowbit.measure.card import json_ready
from lowbit.recipes.recipe import Recipe
from lowbit.report.formulas import Range, Step, reading, rounding, scaled_heading, steps
from lowbit.solvers import Call, fit_blocks

_BINS = 32


@dataclass(frozen=True)
class BlockSteps:
    """One block: where it is (half-open ranges), its steps, and its first values one by one."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    range: Range
    steps: tuple[Step, ...]
    learned: tuple[float, ...] | None
    values: tuple[float, ...]
    scaled: tuple[float, ...]
    levels: tuple[float, ...]
    codes: tuple[int, ...]
    dequantized: tuple[float, ...]

    @property
    def errors(self) -> tuple[float, ...]:
        """x' - x of each shown value."""
        return tuple(b - a for a, b in zip(self.values, self.dequantized, strict=True))

    @property
    def count(self) -> int:
        """Values in the whole block."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])

    @property
    def offset(self) -> float | None:
        """The stored zero-point or minimum."""
        return next((s.stored for s in self.steps if s.symbol in "zm"), None)


@dataclass(frozen=True, repr=False)
class Explanation(Displayed):
    """What a recipe does to one array: some blocks in every detail, and the errors over all of it."""

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

    def _brief(self) -> str:
        return f"{self.label}, {self.recipe}, relative error {self.relative_error:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        fmt, skip = self.format, ("blocks", "format", "fit", "solver")
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skip}
        out |= {"format": str(fmt), "fit": None if self.fit is None else str(self.fit), "solver": str(self.solver)}
        out |= {"rounding": rounding(fmt), "scaled_is": scaled_heading(fmt), "reading": reading(fmt)}
        out["blocks"] = [
            {**dataclasses.asdict(b), "errors": b.errors, "steps": [_step(s) for s in b.steps]} for b in self.blocks
        ]
        return json_ready(out)


def parse_array(text: str) -> Tensor:
    """'[-0.3, 0, 0.1]' or '[[1, 2], [3, 4]]' as float32. WeightError when it is no array of numbers."""
    example = "write numbers in brackets, such as '[-0.3, 0, 0.1, 0.7]' or '[[1, 2], [3, 4]]'"
    try:
        value = ast.literal_eval(text.strip())
        array = torch.tensor(value, dtype=torch.float32)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, RuntimeError, OverflowError):
        raise WeightError(f"{text[:80]!r} is not an array of numbers of one shape: {example}") from None
    if array.dim() == 0 or array.dim() > 3 or array.numel() == 0:
        raise WeightError(f"{text[:80]!r} is not an array of one to three dimensions: {example}")
    return array


def explain(
    weight: Tensor,
    recipe: Recipe,
    fmt: Format | None = None,
    *,
    label: str = "x",
    rows: int | None = None,
    elements: int = 64,
) -> Explanation:
    """Quantize `weight` [out, in] (or a vector, or [n, out, in]) and note every step.

    `fmt` is the recipe's main format unless given. Details are kept of the first block of each of the first
    `rows` rows (of all blocks when None, 16 at most), and of `elements` values of each. WeightError for NaN.
    """
    fmt = fmt or recipe.format
    weight = weight.detach().to(torch.float32)
    if not bool(weight.isfinite().all()):
        bad = int((~weight.isfinite()).sum())
        raise WeightError(f"{label}: {bad} of {weight.numel()} values are NaN or infinite, which no format can hold")
    fit, solver = recipe.fit_for(fmt), recipe.solver_for(fmt)
    q: QTensor = solver(weight, fmt, fit)
    scale, offset = fit_blocks(weight, fmt, fit) if fmt.codebook is None else (None, None)
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
        blocks=tuple(_blocks(weight, q, fit, scale, offset, after, rows, elements)),
        mean_error=float(error.abs().mean()),
        max_error=float(error.abs().max()),
        rms_error=float(error.square().mean().sqrt()),
        relative_error=float(error.norm()) / norm if norm else 0.0,
        bits_per_weight=q.bits_per_weight,
        nbytes=q.nbytes,
        histogram=_histogram(weight, reach),
        histogram_after=_histogram(after, reach),
    )


def _blocks(
    weight: Tensor, q: QTensor, fit: Call, scale: Tensor | None, offset: Tensor | None, after: Tensor,
    rows: int | None, elements: int,
) -> Iterator[BlockSteps]:  # fmt: skip
    """The chosen blocks of the first matrix."""
    _, height, width = as_matrices(q.shape)
    tall, wide = (size if b == -1 else b for b, size in ((q.format.block.rows, height), (q.format.block.cols, width)))
    _, count_r, count_c = q.format.block.counts(q.shape)
    if rows is None:
        places = [(r, c) for r in range(count_r) for c in range(count_c)][:16]
    else:
        places = [(r, 0) for r in range(min(count_r, -(-rows // tall)))]
    matrices = [t.reshape(-1, height, width)[0] for t in (weight, q.unpacked(), after)]
    scales, offsets = q.scales(), q.offsets()
    for r, c in places:
        r0, r1, c0, c1 = r * tall, min(height, (r + 1) * tall), c * wide, min(width, (c + 1) * wide)
        block, codes, values = (m[r0:r1, c0:c1].reshape(-1) for m in matrices)
        x, codes = block[:elements], codes[:elements]
        reach = Range(float(block.min()), float(block.max()))
        learned = _learned(q, r0, c0)
        s, z = (None if t is None else t[0, r, c] for t in (scales, offsets))
        raw = scale if scale is not None else scales
        found = steps(reach, q.format, fit, _number(raw, r, c), _number(offset, r, c) if offset is not None else None)
        if q.format.codebook is not None and found:
            found = [Step("s", "", "", found[0].value, note="found together with the levels")]
        levels = q.format.grid.decode(codes) if learned is None else learned[codes.to(torch.int64)]
        yield BlockSteps(
            (r0, r1), (c0, c1), reach,
            tuple(_with_stored(step, q.format, s, z) for step in found),
            None if learned is None else tuple(learned.tolist()),
            tuple(x.tolist()), tuple(_scaled(x, q.format, s, z).tolist()), tuple(levels.tolist()),
            tuple(codes.tolist()), tuple(values[:elements].tolist()),
        )  # fmt: skip


def _learned(q: QTensor, row: int, column: int) -> Tensor | None:
    """The learned levels that serve this place of the first matrix."""
    book = q.format.codebook
    if q.levels is None or book is None:
        return None
    r = 0 if book.rows == -1 else row // book.rows
    c = 0 if book.cols == -1 else column // book.cols
    return q.levels[0, r, c].to(torch.float32)


def _scaled(x: Tensor, fmt: Format, s: Tensor | None, z: Tensor | None) -> Tensor:
    """The value that is rounded, as `encode` computes it."""
    if s is None:
        return x
    inverse = (1 / s).nan_to_num(0.0, 0.0, 0.0)
    if z is None:
        return x * inverse
    return (x - z) * inverse if fmt.offset_kind == "min" else x * inverse + z


def _with_stored(step: Step, fmt: Format, s: Tensor | None, z: Tensor | None) -> Step:
    """The step with the value that is read back and the name of how it is kept."""
    kept, store = (s, fmt.scale) if step.symbol == "s" else (z, fmt.offset.store if fmt.offset else None)
    name = f"{fmt.grid}" if store == "grid" else str(store)
    return dataclasses.replace(step, stored=None if kept is None else float(kept), store=name)


def _number(values: Tensor | None, r: int, c: int) -> float | None:
    return None if values is None else float(values[0, r, c])


def _histogram(values: Tensor, reach: float) -> tuple[int, ...]:
    return tuple(int(n) for n in torch.histc(values, _BINS, -reach, reach).tolist())


def _step(step: Step) -> dict[str, Any]:
    return {**dataclasses.asdict(step), "text": str(step)}
