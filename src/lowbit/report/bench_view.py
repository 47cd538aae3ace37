"""What `bench` found, drawn for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit.measure.bench import Bench
from lowbit.measure.bench_table import caption, columns, notes

if TYPE_CHECKING:
    from rich.console import RenderableType


def render_bench(bench: Bench) -> RenderableType:
    """The table for a terminal."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    shown = columns(bench)
    for i, (name, _) in enumerate(shown):
        table.add_column(name.replace(" ", "\n") if i else name, justify="right" if i else "left", overflow="fold")
    for row in bench.rows:
        table.add_row(*(Text(text(row)) for _, text in shown))
    return Group(table, *(Text(note, style="yellow") for note in notes(bench)), Text(caption(bench), style="dim"))
