"""Names of recipes, drawn: a short list of everything, or the whole of a few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowbit.errors import LowbitError
from lowbit.recipes.presets import GROUPS, START
from lowbit.report.catalogue import KINDS, METHODS, Entry, fallback
from lowbit.report.explain_what import recipe_alone
from lowbit.report.layout import Lines, named_lines, wrapped

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

LOSS = (
    "Loss means the KL divergence from the original model. It was measured on a model of 135 million parameters; larger models lose "
    "less."
)
_FEW = 4  # entries whose formulas and sources are printed


def render_catalogue(entries: Sequence[Entry], width: int) -> RenderableType:
    """All presets by what they are for, the names of everything else, and how to see more."""
    from rich.console import Group
    from rich.text import Text

    elements: list[RenderableType] = [Text("Presets", "bold")]
    presets = [e for e in entries if e.kind == "preset"]
    column = max(len(e.name) for e in presets) + 2
    for group in GROUPS:
        rows = [(f"  {e.name}", _short(e, group)) for e in presets if e.group == group]
        elements += [Text(f"\n{group}", "bold"), named_lines(rows, column)]
    elements.append(Text("\nMethods that recipes are built from", "bold"))
    elements.append(
        named_lines(
            [(f"  {kind}", f"{KINDS[kind][0]}: {', '.join(_names(entries, kind))}") for kind in METHODS], column
        )
    )
    elements.append(Text("\nFormats with a name, estimators of ranges of inputs, KV caches", "bold"))
    elements.append(
        named_lines([(f"  {kind}", ", ".join(_names(entries, kind))) for kind in ("format", "range", "cache")], column)
    )
    elements += [Text("\nHow a recipe is written", "bold"), Lines(_grammar(width))]
    more = [
        ("  lowbit recipes w4", "everything about one name, or about all names that contain this"),
        ("  lowbit recipes fit", f"everything of a kind: method, {', '.join(KINDS)}"),
        ("  lowbit plan MODEL w4", "what a recipe would make of each tensor of a model"),
        ("  lowbit explain w4", "the arithmetic of a recipe, step by step"),
    ]
    return Group(*elements, Text("\nTo see more", "bold"), named_lines(more), Text(""), Lines(wrapped(LOSS, width)))


def _short(entry: Entry, group: str) -> str:
    return f"{entry.summary} {dict(entry.facts)['when']}" if group == START else entry.summary


def _names(entries: Sequence[Entry], kind: str) -> list[str]:
    return [e.name for e in entries if e.kind == kind]


def _grammar(width: int) -> list[Text]:
    """A few lines with examples, which are not broken."""
    said = [
        "  A recipe is a preset, a format (int4:g32), METHOD@FORMAT, or any of these with settings for the embedding (embed=) and for "
        "layers by their names:",
        "    search@int4:g32,embed=int6:g64,*.down_proj=int8:channel,*.layers.0.*=keep",
        "  a= also rounds the inputs of linear layers, and a:GLOB= those of the layers whose names match. Their scales are found while the "
        "model runs (int8:g64), or once from text by an estimator (minmax@int8:tensor). Layers whose inputs have far too large a range "
        f"for that still find their scales while the model runs; fallback= says how ({fallback()} unless given):",
        "    smooth+search@int8:channel,a=minmax@int8:tensor,a:*.down_proj=int8:g64",
        "  kv= says how the result stores its KV cache, k= and v= for keys and values apart; kv=auto lets a check of the result choose:",
        "    w4,kv=int8    w4,k=int8,v=int4:g32    w4,kv=auto",
    ]
    return [line for text in said for line in _indented(text, width)]


def render_entries(entries: Sequence[Entry], others: Sequence[str], width: int) -> RenderableType:
    """Everything about some names; of a few also formulas and sources. others: names that are like them."""
    from rich.console import Group
    from rich.text import Text

    elements: list[RenderableType] = []
    for entry in entries:
        kind = f"preset, {entry.group}" if entry.group else f"{entry.kind}: {KINDS[entry.kind][0]}"
        lines = wrapped(Text.assemble((entry.name, "bold"), (f"  {kind}", "dim")), width)
        lines += _indented(f"  {entry.summary}", width)
        elements += [Lines(lines), named_lines([(f"  {what}", text) for what, text in entry.facts])]
        if entry.details and len(entries) <= _FEW:
            elements.append(Lines([Text(), *_details(entry.details, width)]))
        elements.append(Text())
    names = list(dict.fromkeys(entry.name for entry in entries))
    if len(names) == 1 and explained(names[0]):
        said = f"lowbit explain {names[0]}"
        elements.append(Lines([Text.assemble((said, "cyan"), " shows it at work on numbers."), Text()]))
    if others:
        elements.append(Lines(_indented(f"Other names that contain this: {', '.join(others)}", width)))
    elif len(entries) > _FEW and any(e.details for e in entries):
        elements.append(Lines(_indented("`lowbit recipes NAME` also prints formulas and sources.", width)))
    return Group(*elements)


def explained(name: str) -> bool:
    """Whether `lowbit explain NAME` shows something."""
    try:
        return recipe_alone(name) is not None
    except LowbitError:
        return False


def _details(text: str, width: int) -> list[Text]:
    """Paragraphs filled to the width; lines that are indented, which are formulas, stay as they are."""
    from rich.text import Text

    lines = list[Text]()
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(" "):
            lines += [Text(f"  {line}") for line in paragraph.split("\n")]
        else:
            lines += _indented(f"  {' '.join(paragraph.split())}", width)
        lines.append(Text())
    return lines[:-1]


def _indented(text: str, width: int) -> list[Text]:
    """A paragraph, all lines of which begin where its first one does."""
    from rich.text import Text

    blank = " " * (len(text) - len(text.lstrip()))
    return [Text.assemble(blank, line) for line in wrapped(text.lstrip(), width - len(blank))]
