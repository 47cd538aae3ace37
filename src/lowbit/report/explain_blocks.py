"""The blocks of a quantized array, value by value.

Nothing is computed a second way: scale and offset come from the fit, codes from the solver, values from
`QTensor.dequantize()`; only `scaled`, the value just before rounding, is worked out here to be shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.formats import Format, QTensor
from lowbit.formats.blocks import as_matrices
from lowbit.report.formulas import Range, Step, steps
from lowbit.report.remarks import remarks
from lowbit.report.stored import kept_text
from lowbit.report.wording import number_text as num
from lowbit.solvers import Call


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
    remarks: tuple[str, ...] = ()

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


def blocks_of(
    weight: Tensor, q: QTensor, fit: Call, scale: Tensor | None, offset: Tensor | None, after: Tensor,
    rows: int | None, elements: int,
) -> Iterator[BlockSteps]:  # fmt: skip
    """The first block of each of `rows` rows of the first matrix (all blocks for None, 16 at most), `elements` values of each."""
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
        scaled = _scaled(x, q.format, s, z)
        yield BlockSteps(
            (r0, r1), (c0, c1), reach,
            tuple(_with_stored(step, q, s, z, (r, c)) for step in found),
            None if learned is None else tuple(learned.tolist()),
            tuple(x.tolist()), tuple(scaled.tolist()), tuple(levels.tolist()),
            tuple(codes.tolist()), tuple(values[:elements].tolist()),
            (*_moved(found, reach, q, s, z),
             *remarks(x, scaled, codes, learned, q.format, fit, None if s is None else float(s))),
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


def _with_stored(step: Step, q: QTensor, s: Tensor | None, z: Tensor | None, place: tuple[int, int]) -> Step:
    """The step with the value that is read back, the name of how it is kept, and its parts where it has some."""
    fmt = q.format
    kept, store = (s, fmt.scale) if step.symbol == "s" else (z, fmt.offset.store if fmt.offset else None)
    name = f"{fmt.grid}" if store == "grid" else str(store)
    parts = kept_text(q, "scale" if step.symbol == "s" else "offset", place)
    return dataclasses.replace(step, stored=None if kept is None else float(kept), store=name, parts=parts)


def _moved(found: list[Step], reach: Range, q: QTensor, s: Tensor | None, z: Tensor | None) -> tuple[str, ...]:
    """Why the end of the range does not get the end of the levels: a zero-point is kept as a whole number."""
    step = next((step for step in found if step.symbol == "z"), None)
    if step is None or step.value is None or not step.formula or s is None or z is None:
        return ()
    by = float(z) - step.value
    if abs(by) < 0.25:
        return ()
    ends = [
        f"the {name} value {num(x)} gets {num(float(level))}, not {num(end)}"
        for name, x, end in (("lowest", reach.low, q.format.grid.lo), ("highest", reach.high, q.format.grid.hi))
        if (level := q.format.grid.round(torch.tensor([x]) * (1 / s) + z)[0]) != end
    ]
    said = f"The zero-point is rounded from {num(step.value, 4)} to {num(float(z))}, which moves all levels by {num(by, 2)}"
    return (f"{said}: {' and '.join(ends)}." if ends else f"{said}.",)


def _number(values: Tensor | None, r: int, c: int) -> float | None:
    return None if values is None else float(values[0, r, c])
