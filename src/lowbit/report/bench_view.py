"""What `bench` found, drawn for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit.measure.bench import Bench
from lowbit.measure.bench_table import caption, columns, notes
from lowbit.report.layout import Lines, table_or_list, wrapped

if TYPE_CHECKING:
    from rich.console import RenderableType


def render_bench(bench: Bench, *, width: int = 1000) -> RenderableType:
    """The figures as a table, or where `width` characters have no room for one as a list."""
    from rich.console import Group
    from rich.text import Text

    shown = columns(bench)
    headings = [name.replace(" ", "\n") for name, _ in shown]
    rows = [[text(row) for _, text in shown] for row in bench.rows]
    said = [*(Text(note, style="yellow") for note in notes(bench)), Text(caption(bench), style="dim")]
    below = Lines([line for text in said for line in wrapped(text, width)])
    return Group(table_or_list(headings, rows, width, left=headings[:1]), below)
