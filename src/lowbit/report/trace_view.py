"""A method at work, drawn for people: sentences wrapped, tables folded into blocks of columns where they are too wide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowbit.report.at_work.trace import Cell, Listing, Outcome, Trace
from lowbit.report.wording import number_text as num

if TYPE_CHECKING:
    from rich.console import RenderableType

_DIGITS = 4


def trace_lines(trace: Trace, width: int) -> list[RenderableType]:
    """What there is to draw of one method, in reading order."""
    from rich.text import Text

    elements: list[RenderableType] = [Text(f"{trace.method} at work", style="bold")]
    for i, part in enumerate(trace.parts):
        if isinstance(part, str):
            after = trace.parts[i + 1 : i + 2]
            elements.append(Text(part if after and not isinstance(after[0], str) else f"{part}\n"))
        else:
            elements.append(Text(_listing(part, width), no_wrap=True))
    if trace.outcome is not None and trace.outcome.errors:
        elements += [Text(f"{trace.outcome.measure}:"), Text(_outcome(trace.outcome), no_wrap=True)]
    return elements


def _listing(part: Listing, width: int) -> str:
    places = range(len(part.rows)) if part.shown is None else part.shown
    if part.shown == ():
        return f"  ({len(part.rows)} x {len(part.columns) - 1} numbers, which --json shows)\n"
    rows = [(*part.rows[i], "<- best" if i == part.best else "") for i in places]
    if part.best is None:
        return folded(part.columns, [row[:-1] for row in rows], width)
    return folded((*part.columns, ""), rows, width)


def _outcome(made: Outcome) -> str:
    """Errors below one another, each beside the first."""
    longest = max(len(name) for name, _ in made.errors)
    first = made.errors[0][1]
    lines = []
    for i, (name, error) in enumerate(made.errors):
        share = error / first if i and first else None
        times = "" if share is None else f"   {num(share, 3)} times" if share > 2 else f"   {num(100 * share, 3)} %"
        lines.append(f"  {name:<{longest}}  {num(error, _DIGITS):>10}{times}{' of the first' if times else ''}")
    return "\n".join(lines) + "\n"


def folded(headings: Sequence[str], rows: Sequence[Sequence[Cell]], width: int) -> str:
    """A table of text, at most `width` wide: columns that do not fit stand below, each time after the first column."""
    cells = [[_cell(value) for value in row] for row in rows]
    sizes = [max(len(h), *(len(row[i]) for row in cells)) if cells else len(h) for i, h in enumerate(headings)]
    runs: list[list[int]] = [[]]
    for i in range(1, len(headings)):
        if runs[-1] and 2 + sizes[0] + sum(sizes[j] + 2 for j in (*runs[-1], i)) > width:
            runs.append([])
        runs[-1].append(i)
    lines = []
    for run in runs:
        for row in ([*headings], *cells):
            first = (
                f"{row[0]:<{sizes[0]}}"
                if isinstance(row[0], str) and not _is_number(row[0])
                else f"{row[0]:>{sizes[0]}}"
            )
            rest = "".join(
                f"  {row[i]:<{sizes[i]}}" if row[i].startswith("<-") else f"  {row[i]:>{sizes[i]}}" for i in run
            )
            lines.append(f"  {first}{rest}".rstrip())
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    return num(value, _DIGITS) if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    return text.lstrip("-").isdigit()
