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

    elements: list[RenderableType] = [Text(f"\n{trace.method} at work", style="bold")]
    for part in trace.parts:
        if isinstance(part, str):
            elements.append(Text(part))
        else:
            elements.append(Text(_listing(part, width), no_wrap=True))
    if trace.outcome is not None and trace.outcome.errors:
        elements.append(Text(_outcome(trace.outcome), no_wrap=True))
    return elements


def _listing(part: Listing, width: int) -> str:
    places = range(len(part.rows)) if part.shown is None else part.shown
    rows = [(*part.rows[i], "<- best" if i == part.best else "") for i in places]
    if part.best is None:
        return folded(part.columns, [row[:-1] for row in rows], width)
    return folded((*part.columns, ""), rows, width)


def _outcome(made: Outcome) -> str:
    """Errors below one another, each beside the first."""
    longest = max(len(name) for name, _ in made.errors)
    first = made.errors[0][1]
    lines = ["mean squared error of the result:"]
    for i, (name, error) in enumerate(made.errors):
        share = f"   {num(100 * error / first, 3)} % of it" if i and first else ""
        lines.append(f"  {name:<{longest}}  {num(error, _DIGITS):>10}{share}")
    return "\n".join(lines)


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
            first = f"{row[0]:<{sizes[0]}}" if isinstance(row[0], str) and not _is_number(row[0]) else f"{row[0]:>{sizes[0]}}"
            rest = "".join(f"  {row[i]:<{sizes[i]}}" if row[i].startswith("<-") else f"  {row[i]:>{sizes[i]}}" for i in run)
            lines.append(f"  {first}{rest}".rstrip())
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    return num(value, _DIGITS) if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    return text.lstrip("-").isdigit()
