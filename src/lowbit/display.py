"""How results show themselves: `print` gives the tables of the command line, a notebook the same as HTML, and repr() one short line.

A result may stand in any room, while its picture is drawn in `report`, which is above most. So only the name of the table of
pictures is known here, and it is imported when something is shown.
"""

from __future__ import annotations

import re
import shutil
import unicodedata
from importlib import import_module
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

VIEWS = "lowbit.report.views"  # its `drawn(value, width)` gives the picture of a value
_LONGEST = 140  # characters of a repr
_NOTEBOOK_WIDTH = 100  # columns
# Escapes move the cursor and paint, and marks of direction turn a line around: neither has a place in a name that a file brings.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_HTML = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:1.25;'
    "font-family:Menlo,'DejaVu Sans Mono',Consolas,'Courier New',monospace\">{code}</pre>"
)


class Displayed:
    """A result that prints as the table of its command.

    A class that has it says in `_brief` what it is in a few words, has no `__repr__` or `__str__` of its own (a dataclass says
    `repr=False`), and has a line in `lowbit/report/views.py`.
    """

    def _brief(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        return named(self, self._brief())

    def __str__(self) -> str:
        """The table, as wide as the terminal, or 80 columns where there is none. No colours."""
        return as_text(self, shutil.get_terminal_size((80, 24)).columns)

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        return as_html(self)


def named(value: object, brief: str) -> str:
    """'Plan(smollm2, w4)': the type and what it is in a few words, on one line of bounded length."""
    text = " ".join(visible(brief).split())
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
    return f"{type(value).__name__}({text})"


def as_text(value: Any, width: int) -> str:
    """The picture of a value as plain text, in lines of `width` characters where no name is longer; no line feed at the end."""
    console = _console(width, color_system=None)
    console.print(import_module(VIEWS).drawn(value, width), crop=False)
    lines = visible(console.file.getvalue()).split("\n")  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def as_html(value: Any) -> str:
    """The picture of a value as HTML in which nothing that a model brings is read as HTML."""
    console = _console(_NOTEBOOK_WIDTH, color_system="truecolor", record=True)
    console.print(import_module(VIEWS).drawn(value, _NOTEBOOK_WIDTH), crop=False)
    return visible(console.export_html(inline_styles=True, code_format=_HTML))


def visible(text: str) -> str:
    r"""`text` with characters that are no text, such as escapes of a terminal, as they are written in Python: `\x1b`."""
    return _HIDDEN.sub(lambda found: _written(found[0]), text)


def _written(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x} ({unicodedata.name(character, 'unnamed').lower()})"


def _console(width: int, **how: Any) -> Console:
    """A console that writes into memory and takes no text for markup."""
    from rich.console import Console

    return Console(
        file=StringIO(), width=width, markup=False, emoji=False, highlight=False, force_jupyter=False,
        force_terminal=how.get("color_system") is not None, legacy_windows=False, **how,
    )  # fmt: skip
