"""An explanation drawn for people."""

from __future__ import annotations

import re
from math import isfinite
from typing import TYPE_CHECKING

from lowbit.formats import IntGrid
from lowbit.report.explain import BlockSteps, Explanation
from lowbit.report.explain_what import Names
from lowbit.report.formulas import reading, rounding, scaled_heading
from lowbit.report.layout import named_lines
from lowbit.report.trace_view import folded, trace_lines
from lowbit.report.wording import bytes_text, count_text, shape_text, sparkline
from lowbit.report.wording import number_text as num

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from lowbit.formats import Format

_FLOATS = {"e2m1": (2, 1), "e4m3": (4, 3), "e5m2": (5, 2)}  # bits of exponent and of mantissa
_NAMES = 8  # characters of the column of names, so that those of all blocks stand below one another
_WIDTH = 80
_DUST = 2.0**-22  # of a value: two steps of a float32 number, which codes and scales do not answer for


def render_explanation(found: Explanation, width: int = _WIDTH) -> RenderableType:
    """What the recipe means, every shown block step by step, the errors over the whole array, and each method at work."""
    from rich.console import Group
    from rich.text import Text

    title = found.recipe if len(found.recipe) <= width else found.recipe.replace(" = ", " =\n  ", 1)
    heading = Text(title, style="bold", no_wrap=True, overflow="ignore")
    elements: list[RenderableType] = [heading, named_lines(_head(found), _NAMES), Text()]
    alone = ", without inputs" if found.inputs is not None else ""
    if found.at_work:
        elements.append(Text(f"Each value on its own{alone}", style="bold"))
    for block in found.blocks:
        elements += _block(found, block)
    shown = len(found.blocks)
    if shown < found.block_count:
        elements.append(
            Text(f"{shown} of {found.block_count} blocks {'is' if shown == 1 else 'are'} shown\n", style="dim")
        )
    elements.append(named_lines(_errors(found), _NAMES))
    if found.at_work:
        elements.append(Text())
    if found.inputs is not None:
        elements += [Text("The inputs x of the layer, one in a row", style="bold")]
        elements += [Text("From here on w is a value of the weight W, and x one of an input; the output is x W^T.")]
        heads = ("input", *(f"x{k}" for k in range(len(found.inputs[0]))))
        rows = [(i, *row) for i, row in enumerate(found.inputs)]
        elements.append(Text(folded(heads, rows, width), no_wrap=True))
    for trace in found.at_work:
        elements += trace_lines(trace, width)
    return Group(*elements)


def render_names(found: Names) -> RenderableType:
    """Names of which one has to be chosen, and the command for the first."""
    from rich.console import Group
    from rich.text import Text

    lines = [Text(f"{found.said}:"), *(Text(f"  {name}", no_wrap=True, overflow="ignore") for name in found.names)]
    return Group(
        *lines, Text("\nShow the first:"), Text(f"  {found.first}", style="cyan", no_wrap=True, overflow="ignore")
    )


def _head(found: Explanation) -> list[tuple[str, str | Text]]:
    fmt = found.format
    lines: list[tuple[str, str | Text]] = [
        ("array", f"{found.label}, {shape_text(found.shape)} values"),
        ("grid", grid_text(fmt)),
    ]
    blocks = f"{found.block_count} block" + ("s" if found.block_count > 1 else "")
    lines.append(("block", f"{fmt.block}: {_blocks_text(fmt)} ({blocks} here)"))
    if found.fit is not None:
        lines.append(("fit", f"{found.fit}: {found.fit.method.summary}"))
    if str(found.solver) != "rtn":
        lines.append(("solver", f"{found.solver}: {found.solver.method.summary}"))
    lines.append(("symbols", _symbols(found)))
    return lines + [("note", remark) for remark in found.remarks]


def _symbols(found: Explanation) -> str:
    """Every letter that the formulas below use."""
    fmt = found.format
    words = ["x a value", "x' what is read back"]
    if fmt.scale is not None:
        words.insert(1, "s the scale, what a level is multiplied with")
    if fmt.offset is not None:
        kind = (
            "m the minimum, the value of level 0"
            if fmt.offset_kind == "min"
            else "z the zero-point, the level that 0 is at"
        )
        words.insert(2, kind)
    named = re.findall(r"\b(?:lo|hi)\b", found.fit.method.summary if found.fit is not None else "")
    words += [{"lo": "lo the lowest level", "hi": "hi the highest level"}[name] for name in sorted(set(named))]
    return "; ".join([*words, "code the number that is stored for a level"])


def code_text(fmt: Format) -> str:
    """How the number that is stored follows from the level."""
    grid = fmt.grid
    if isinstance(grid, IntGrid):
        low = num(abs(grid.lo))
        return (
            "code = level"
            if not grid.lo
            else f"code = level - lowest level = level {'+' if grid.lo < 0 else '-'} {low}"
        )
    if fmt.codebook is not None:
        return "code = the number of the level among the learned ones, from 0"
    if str(grid) in _FLOATS:
        exponent, mantissa = _FLOATS[str(grid)]
        return (
            f"code = the {grid.bits} bits of the level as a number: sign, {exponent} bits of exponent, {mantissa} of mantissa "
            f"(e{exponent}m{mantissa})"
        )
    if list(grid.levels.tolist()) == sorted(grid.levels.tolist()):
        return "code = the place of the level in the list of the grid, from 0"
    return f"code = the place of the level in this list, from 0: {'  '.join(num(v, 3) for v in grid.levels.tolist())}"


def grid_text(fmt: Format) -> str:
    """'int8, the 256 integers from -128 to 127', or all levels when they are few."""
    grid = fmt.grid
    if isinstance(grid, IntGrid):
        return f"{grid}, the {grid.cardinality} integers from {num(grid.lo)} to {num(grid.hi)}"
    if fmt.codebook is not None:
        return f"{grid}, {grid.cardinality} levels learned for each {_unit(str(fmt.codebook))}"
    levels = sorted({float(v) for v in grid.levels.tolist() if isfinite(v)})
    if len(levels) > 16:
        return f"{grid}, {len(levels)} levels from {num(grid.lo)} to {num(grid.hi)}"
    return f"{grid}, {len(levels)} levels: {'  '.join(num(v, 3) for v in levels)}"


def _unit(block: str) -> str:
    return {"channel": "row", "tensor": "tensor"}.get(block, f"block {block}")


def _blocks_text(fmt: Format) -> str:
    what = "scale" if fmt.scale is not None else "set of levels"
    unit = {"tensor": "the whole tensor", "channel": "a row"}
    where = unit.get(str(fmt.block), f"{fmt.block.cols} values of a row" if fmt.block.rows == 1 else "each rectangle")
    return f"one {what} for {where}"


def _block(found: Explanation, block: BlockSteps) -> list[RenderableType]:
    from rich.text import Text

    fmt, reach = found.format, block.range
    elements: list[RenderableType] = []
    if found.block_count > 1:
        elements.append(Text(_place(block), style="bold"))
    lines: list[tuple[str, str | Text]] = [
        ("range", f"min {num(reach.low)}   max {num(reach.high)}   max|x| {num(reach.peak)}")
    ]
    for step in block.steps:
        lines.append(({"s": "scale", "z": "zero", "m": "minimum"}[step.symbol], str(step)))
        if step.stored is not None and step.value is not None:
            changed = num(step.stored, 7) != num(step.value, 7)
            kept = f"kept in {step.store}" + (f" as {num(step.stored, 7)}" if changed else "")
            kept = f"{kept}: {step.parts}" if step.parts else kept
            lines.append(("", Text(f"{step.note}; {kept}" if step.note else kept, style="dim")))
    if block.learned is not None:
        lines.append(("levels", "  ".join(dict.fromkeys(num(v, 4) for v in block.learned))))
    lines += [("round", rounding(fmt)), ("read", reading(fmt)), ("code", code_text(fmt))]
    elements += [named_lines(lines, _NAMES), _values(fmt, block)]
    if block.remarks:
        elements += [named_lines([("note", remark) for remark in block.remarks], _NAMES), Text()]
    return elements


def _place(block: BlockSteps) -> str:
    (r0, r1), (c0, c1) = block.rows, block.columns
    rows = f"row {r0}" if r1 - r0 == 1 else f"rows {r0} to {r1 - 1}"
    columns = f"column {c0}" if c1 - c0 == 1 else f"columns {c0} to {c1 - 1}"
    return f"{rows}, {columns}"


def _values(fmt: Format, block: BlockSteps) -> RenderableType:
    from rich import box
    from rich.table import Table

    more = block.count - len(block.values)
    caption = f"{more} more values in this block" if more else None
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", caption=caption, caption_justify="left", padding=(0, 1))
    headings = ["x", *([] if fmt.scale is None else [scaled_heading(fmt)]), "level", "code", "x'", "error"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    dust = block.range.peak if fmt.offset is not None else 0.0  # which s * level + m is computed from
    for x, scaled, level, code, value, error in zip(
        block.values, block.scaled, block.levels, block.codes, block.dequantized, block.errors, strict=True
    ):
        before = [] if fmt.scale is None else [f"{round(scaled, 4) + 0.0:.4f}"]
        table.add_row(num(x), *before, num(level, 5), str(code), num(value), _error_text(max(abs(x), dust), error))
    return table


def _error_text(size: float, error: float) -> str:
    """0 for what is only the rounding of float32 numbers of this size."""
    return f"{error:+.3g}" if abs(error) > _DUST * size else "0"


def _errors(found: Explanation) -> list[tuple[str, str | Text]]:
    mean, most, rms = (num(v, 4) for v in (found.mean_error, found.max_error, found.rms_error))
    lines: list[tuple[str, str | Text]] = [
        ("error", f"mean |e| {mean}   max |e| {most}   rms {rms}"),
        ("relative", f"||x' - x|| / ||x|| = {num(100 * found.relative_error, 4)} %"),
        ("size", f"{num(found.bits_per_weight, 5)} bits per value, scales and all ({bytes_text(found.nbytes)})"),
    ]
    if found.bits_from:
        lines.append(("", found.bits_from))
    if sum(found.histogram) >= 256:
        lines.append(("before", f"{sparkline(found.histogram)}  {count_text(sum(found.histogram))} values"))
        lines.append(("after", sparkline(found.histogram_after)))
    return lines
