"""Shapes that several views draw with: lines with names, and rows that are a table where it fits and a list where it does not.

Nothing is cut: text wraps between words, and a word (a recipe, a file, the name of a tensor) that is longer than the line
stands on a line of its own and runs over the edge. A console that prints these must not crop (`crop=False`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from lowbit.report.wording import fitting

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.measure import Measurement
    from rich.text import Text

    Cell = str | Text

_GAP = 2  # blank columns between what stands side by side
_INDENT = 2
_NARROW = 24  # columns; text of several words in fewer is unpleasant to read, and goes below its name


def as_text(cell: Cell) -> Text:
    """The cell as it is: a string has no markup."""
    from rich.text import Text

    return Text(cell) if isinstance(cell, str) else cell


def wrapped(cell: Cell, width: int) -> list[Text]:
    """The lines of a text, broken between words only: one that is longer than `width` has a line of its own."""
    lines: list[Text] = []
    for paragraph in as_text(cell).split("\n", allow_blank=True):
        start = end = 0  # what a paragraph is indented by stays
        for word in re.finditer(r"\S+", paragraph.plain):
            if end and paragraph[start : word.end()].cell_len > width:
                lines.append(paragraph[start:end])
                start = word.start()
            end = word.end()
        lines.append(paragraph[start:end])
    return lines


class Lines:
    """Lines as they are, which wrap no further: what is too long runs over the edge."""

    def __init__(self, lines: Sequence[Text]) -> None:
        self.lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines:
            copy = line.copy()
            copy.no_wrap, copy.overflow = True, "ignore"
            yield copy


class NamedLines:
    """Names and what they stand for, each wrapped in its own column; below the name where there is too little room beside it."""

    def __init__(self, pairs: Iterable[tuple[str, Cell]], min_width: int = 0) -> None:
        self.pairs = [(name, as_text(value)) for name, value in pairs]
        self.column = max([min_width, *(as_text(name).cell_len for name, _ in self.pairs)]) + _GAP

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return Lines(self.drawn(options.max_width)).__rich_console__(console, options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        widest = max((line.cell_len for line in self.drawn(options.max_width)), default=0)
        return Measurement(widest, widest)

    def drawn(self, width: int) -> list[Text]:
        """The lines in so many columns."""
        from rich.text import Text

        found = []
        for name, value in self.pairs:
            head = Text(name, "cyan")
            beside = wrapped(value, width - self.column)
            if _width(beside) <= width - self.column and (width - self.column >= _NARROW or len(beside) == 1):
                head.pad_right(self.column - head.cell_len)
                found += [_joined(head if i == 0 else Text(" " * self.column), line) for i, line in enumerate(beside)]
            else:
                found.append(head)
                found += [_joined(Text(" " * 2 * _INDENT), line) for line in wrapped(value, width - 2 * _INDENT)]
        for line in found:
            line.rstrip()
        return found


def named_lines(pairs: Iterable[tuple[str, Cell]], min_width: int | None = None) -> NamedLines:
    """Names and what they stand for, wrapped within their own column."""
    return NamedLines(pairs, min_width or 0)


def headline(name: str, recipe: str, width: int) -> Lines:
    """A model and what is or was made of it, on one line where both have room there."""
    from rich.text import Text

    line = Text.assemble((name, "bold"), "  ", recipe)
    return Lines([line] if line.cell_len <= width else [Text(name, "bold"), *wrapped(Text(f"  {recipe}"), width)])


def table_or_list(
    headings: Sequence[str], rows: Sequence[Sequence[Cell]], width: int, *, expendable: Sequence[str] = (),
    left: Collection[str] = (), dim: Collection[int] = (), ruled: Collection[int] = (),
) -> RenderableType:  # fmt: skip
    """Rows as a table where one is at most `width` columns wide, else as a list: the first cell, and below it the others with their names.

    expendable: headings of columns that a table may do without, the first named first; a list has them all. left: headings of columns
    of text; numbers stand to the right. dim: indices of rows that matter less. ruled: indices of rows with a line below them.
    """
    texts = [[as_text(cell) for cell in row] for row in rows]
    table = _fitting_table(headings, texts, width, expendable, left, dim, ruled)
    return Lines(_list(headings, texts, width, dim) if table is None else table)


def columns_shown(
    headings: Sequence[str], rows: Sequence[Sequence[Cell]], width: int, expendable: Sequence[str] = ()
) -> list[int]:
    """Indices of the columns of the table that `table_or_list` makes of the same rows; none where it makes a list, which has all."""
    texts = [[as_text(cell) for cell in row] for row in rows]
    listed = _fitting_table(headings, texts, width, expendable) is None
    return [] if listed else _kept(headings, texts, width, expendable)


def _kept(headings: Sequence[str], texts: Sequence[Sequence[Text]], width: int, expendable: Sequence[str]) -> list[int]:
    return fitting(headings, [[cell.plain for cell in row] for row in texts], width + _GAP, expendable)


def _fitting_table(
    headings: Sequence[str], texts: Sequence[Sequence[Text]], width: int, expendable: Sequence[str],
    left: Collection[str] = (), dim: Collection[int] = (), ruled: Collection[int] = (),
) -> list[Text] | None:  # fmt: skip
    """The lines of a table with the columns that have room; None where it does not fit without what it needs."""
    kept = _kept(headings, texts, width, expendable)
    table = _table([headings[i] for i in kept], [[row[i] for i in kept] for row in texts], left, dim, ruled)
    return table if _width(table) <= width else None


def _width(lines: Sequence[Text]) -> int:
    return max((line.cell_len for line in lines), default=0)


def _table(
    headings: Sequence[str], rows: Sequence[Sequence[Text]], left: Collection[str], dim: Collection[int],
    ruled: Collection[int],
) -> list[Text]:  # fmt: skip
    """The lines of a table, each column as wide as its widest cell. A heading of several words has a line for each."""
    from rich.text import Text

    words = [heading.split("\n") for heading in headings]
    deep = max(map(len, words))
    above = [[Text(([""] * (deep - len(w)) + w)[i], "bold") for w in words] for i in range(deep)]
    widths = [max(row[i].cell_len for row in (*above, *rows)) for i in range(len(headings))]
    rule = Text("─" * (sum(widths) + _GAP * (len(widths) - 1)), "dim")
    lines = [_row(row, widths, headings, left) for row in above] + [rule]
    for number, row in enumerate(rows):
        line = _row(row, widths, headings, left)
        if number in dim:
            line.stylize("dim")
        lines.append(line)
        if number in ruled:
            lines.append(rule)
    return [Text(), *lines, Text()]


def _row(cells: Sequence[Text], widths: Sequence[int], headings: Sequence[str], left: Collection[str]) -> Text:
    """One line of a table."""
    from rich.text import Text

    line = Text()
    for i, (cell, width, heading) in enumerate(zip(cells, widths, headings, strict=True)):
        blank = " " * (width - cell.cell_len)
        line.append(" " * _GAP if i else "")
        line = line.append_text(cell).append(blank) if heading in left else line.append(blank).append_text(cell)
    line.rstrip()
    return line


def _list(headings: Sequence[str], rows: Sequence[Sequence[Text]], width: int, dim: Collection[int]) -> list[Text]:
    """A block for each row: its first cell, then the others with their names, as many on a line as fit, below one another in all blocks."""
    from rich.text import Text

    names = [heading.replace("/\n", "/").replace("\n", " ") for heading in headings]
    fields = [[_joined(Text(f"{name} ", "cyan"), cell) for name, cell in zip(names, row, strict=True)] for row in rows]
    short = [field.cell_len for row in fields for field in row[1:] if field.cell_len <= width // 2 - _INDENT]
    cell, across = max(short, default=0) + _GAP, max(1, (width - _INDENT + _GAP) // (max(short, default=0) + _GAP))
    lines: list[Text] = [Text()]
    for number, (row, named) in enumerate(zip(rows, fields, strict=True)):
        block, beside = [_styled(row[0], "bold")], 0  # how many fields stand on the last line already
        for name, value, field in list(zip(names, row, named, strict=True))[1:]:
            if not value.plain:
                continue
            if field.cell_len + _GAP > cell:  # one that is long has lines of its own
                block += _own_lines(name, value, width)
                beside = across
                continue
            if beside % across == 0:
                block.append(Text(" " * _INDENT))
                beside = 0
            block[-1].pad_right(_INDENT + beside * cell - block[-1].cell_len)
            block[-1].append_text(field)
            beside += 1
        for line in block:
            line.rstrip()
            if number in dim:
                line.stylize("dim")
        lines += [*block, Text()]
    return lines


def _own_lines(name: str, value: Text, width: int) -> list[Text]:
    """A named text over the whole width; below its name where a word has no room beside it."""
    from rich.text import Text

    head = Text.assemble(" " * _INDENT, (f"{name} ", "cyan"))
    room = width - head.cell_len
    beside = wrapped(value, room)
    if _width(beside) <= room:
        return [_joined(head if i == 0 else Text(" " * head.cell_len), line) for i, line in enumerate(beside)]
    return [head, *(_joined(Text(" " * 2 * _INDENT), line) for line in wrapped(value, width - 2 * _INDENT))]


def _styled(text: Text, style: str) -> Text:
    copy = text.copy()
    copy.stylize_before(style)
    return copy


def _joined(first: Text, second: Text) -> Text:
    """Both on one line, each in its own style, which a copy keeps apart from the other's."""
    from rich.text import Text

    return Text().append_text(first).append_text(second)
