"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str]) -> list[str]:
    """The lines of a table. left: headings of columns of text; numbers stand to the right."""
    lines = ["| " + " | ".join("---" if heading in left else "--:" for heading in headings) + " |"]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (headings, *rows)]
    written = ["| " + " | ".join(row) + " |" for row in cells]
    return [written[0], *lines, *written[1:]]
