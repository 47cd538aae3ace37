"""A box around lines and text, in which no name is cut: what has no room in its frame stands inside, and what has none inside has no box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowbit.report.layout import Lines, NamedLines, wrapped

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.text import Text

_FRAME = 6  # columns of both edges with what is blank beside them


class Boxed:
    """`lines` with what stands before and after them, a title above and a footer below."""

    def __init__(
        self, lines: NamedLines, title: Text, *, before: Sequence[RenderableType] = (), after: Sequence[RenderableType] = (),
        footer: Text | None = None, colour: str = "",
    ) -> None:  # fmt: skip
        self.lines, self.title, self.before, self.after = lines, title, before, after
        self.footer, self.colour = footer, colour

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        width = options.max_width
        inner = width - _FRAME
        widest = max((line.cell_len for line in self.lines.drawn(inner)), default=0)
        title = Lines([self.title] if self.title.cell_len <= inner else wrapped(self.title, inner))
        if widest > inner or max(line.cell_len for line in title.lines) > inner:
            footer: list[RenderableType] = [] if self.footer is None else [Text(), self.footer]
            yield Group(Lines(wrapped(self.title, width)), Text(), *self.before, self.lines, *self.after, *footer)
            return
        in_frame = self.title.cell_len <= inner
        below = None if self.footer is None or self.footer.cell_len > widest else self.footer
        head: list[RenderableType] = [] if in_frame else [title, Text()]
        inside: list[RenderableType] = [*head, *self.before, self.lines, *self.after]
        if below is None and self.footer is not None:
            inside += [Text(), self.footer]
        yield Panel(
            Group(*inside), title=self.title if in_frame else None, subtitle=below, border_style=self.colour,
            padding=(1, 2), expand=False,
        )  # fmt: skip
