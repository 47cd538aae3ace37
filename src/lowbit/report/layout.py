"""Shapes that several views draw with: lines with names, and a table that fits the terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from lowbit.report.wording import fitting

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def named_lines(pairs: Iterable[tuple[str, str | Text]], min_width: int | None = None) -> Table:
    """Names and what they stand for, wrapped within their own column."""
    from rich.table import Table
    from rich.text import Text

    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="cyan", no_wrap=True, min_width=min_width)
    lines.add_column(overflow="fold")
    for name, value in pairs:
        lines.add_row(Text(name), Text(value) if isinstance(value, str) else value)
    return lines


def fitted_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], width: int, expendable: Sequence[str], left: Collection[str],
    dim: Collection[int] = (),
) -> Table:  # fmt: skip
    """A table at most `width` characters wide: of the `expendable` columns, the first named first, those that do not fit are left out.

    left: headings of columns of text; numbers stand to the right. dim: indices of rows that matter less.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    kept = fitting(headings, rows, width, expendable)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    for i in kept:
        justify = "left" if headings[i] in left else "right"
        table.add_column(headings[i], justify=justify, no_wrap=i > 0, overflow="fold")  # type: ignore[arg-type]
    for number, row in enumerate(rows):
        table.add_row(*(Text(row[i]) for i in kept), style="dim" if number in dim else "")
    return table
