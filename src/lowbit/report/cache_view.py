"""What a check of the cache found, drawn for a terminal: a table of formats, words, what each layer loses, what to use."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lowbit.kv import CacheFormat, CacheSide
from lowbit.measure.kv.figures import CacheFigures
from lowbit.measure.kv.result import CacheCheck
from lowbit.measure.kv.sensitivity import Sensitivity
from lowbit.measure.kv.size import side_bits
from lowbit.measure.kv.words import judged
from lowbit.report.layout import Lines, columns_shown, headline, named_lines, table_or_list, wrapped
from lowbit.report.panel import VERDICT_COLOURS, estimate_text
from lowbit.report.wording import sparkline

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_HEADINGS = ("cache", "bits", "KL", "±", "top-1 %", "by position", "facts\nfound", "verdict")
_MEANINGS = {
    "bits": "bits: of a number of the cache on average at this context, scales and what is kept exactly included",
    "KL": "KL: how far predictions moved from those with the float cache, in nats per token; 0 is the float cache itself",
    "±": "±: one standard error, over windows, or over blocks of 64 tokens where windows are few",
    "top-1 %": "top-1 %: how often both have the same first choice of the next token",
    "by position": "by position: KL in the tenths of the context, from its beginning to its end",
    "facts\nfound": "facts found: of those planted in the text at five depths and asked at its end",
}
_MOST = 3  # layers that are named as losing most


def render_cache_check(check: CacheCheck, *, width: int = 1000) -> RenderableType:
    """The check in `width` columns."""
    from rich.console import Group
    from rich.text import Text

    title = f"cache at a context of {check.text.length:,} tokens".replace(",", " ")
    parts: list[RenderableType] = [headline(check.model, title, width)]
    rows = check.measured
    if rows:
        cells = [_cells(row) for row in rows]
        asked = any(row.asked for row in rows)
        headings = [h for h in _HEADINGS if asked or not h.startswith("facts")]
        cells = [[c for c, h in zip(row, _HEADINGS, strict=True) if h in headings] for row in cells]
        expendable = ("top-1 %", "±", "by position")
        parts.append(
            table_or_list(headings, cells, width, expendable=expendable, left=("cache", "by position", "verdict"))
        )
        shown = columns_shown(headings, cells, width, expendable) or range(len(headings))
        legend = [_MEANINGS[headings[i]] for i in shown if headings[i] in _MEANINGS]
        parts += [_below(Text(line, "dim"), width) for line in legend]
        said = [line for row in check.rows for line in _said(row)]
        parts += [_below(line, width) for line in [Text(), *said]]
    if check.sensitivity is not None:
        parts += [_below(Text(line), width) for line in ["", *_sensitivity_lines(check.sensitivity)]]
    parts += [_below(line, width) for line in _recommended(check)]
    count = check.text.windows
    measured = f"measured on {check.text.name}, {count} window{'' if count == 1 else 's'} of {check.text.length} tokens; perplexity with the float cache {estimate_text(check.base_perplexity)}"
    parts += [_below(Text(line, "dim"), width) for line in ["", measured, *(f"note: {note}" for note in check.notes)]]
    return Group(*parts)


def render_cache_format(fmt: CacheFormat) -> RenderableType:
    """How keys and values are stored, and layers that differ."""
    words = {"k": "keys", "v": "values"}
    rules = [(f"{words[which]} of layer {glob}", str(side)) for glob, which, side in fmt.layers]
    return named_lines([("keys", str(fmt.keys)), ("values", str(fmt.values)), *rules])


def render_cache_side(side: CacheSide) -> RenderableType:
    """What a side stores, and its bits at heads of 128 channels."""
    context = 4096
    lines = [
        ("stored as", str(side)),
        ("bits", f"{side_bits(side, context, 128):.2f} of a number, at heads of 128 channels and {context} tokens"),
    ]
    return named_lines(lines)


def _below(line: Text, width: int) -> Lines:
    return Lines(wrapped(line, width))


def _cells(row: CacheFigures) -> list[str | Text]:
    from rich.text import Text

    word = judged(row).word
    return [
        row.name, f"{row.bits:.2f}", _kl(row.kl.value), "-" if row.kl.stderr is None else _kl(row.kl.stderr),
        f"{100 * row.top1.value:.2f}", sparkline([d.kl.value for d in row.deciles]), f"{row.found}/{row.asked}",
        Text(word, VERDICT_COLOURS[word]),
    ]  # fmt: skip


def _kl(value: float) -> str:
    return f"{value:.5f}" if value < 10 else f"{value:.3g}"


def _said(row: CacheFigures) -> list[Text]:
    """What must be said of a format; nothing where it costs nothing that a reader could notice."""
    from rich.text import Text

    found = judged(row)
    if found.word == "indistinguishable" and len(found.sentences) == 1:
        return []
    head = Text.assemble((row.name, "bold"), ": ")
    if found.breaks:
        head.append("breaks this model. ", "red")
    return [head + Text(f"{'; '.join(found.sentences)}.")]


def _sensitivity_lines(found: Sensitivity) -> list[str]:
    """Keys against values, and the layers that lose most."""
    common = _compared(found)
    keys, values = found.total("k", common), found.total("v", common)
    lines = [
        f"Of {common} everywhere, keys would cost a KL of {_short(keys)} and values {_short(values)} "
        "(the sum over layers, each measured alone)."
    ]
    places = sorted(found.kl, key=lambda place: -found.kl[place].get(common, 0.0))[:_MOST]
    named = [
        f"{'keys' if which == 'k' else 'values'} of layer {layer} ({_short(found.kl[layer, which][common])})"
        for layer, which in places
    ]
    return [*lines, f"Most of it comes from {', '.join(named)}."]


def _compared(found: Sensitivity) -> str:
    """A candidate of about 4 bits that every layer can have."""
    able = [c for c in found.candidates if c != "int16" and found.total("k", c) + found.total("v", c) < float("inf")]
    return next((c for c in able if "int4" in c), able[0])


def _short(value: float) -> str:
    return f"{value:.2g}"


def _recommended(check: CacheCheck) -> list[Text]:
    from rich.text import Text

    found = check.recommended
    if found is None:
        return []
    if found.figures is None:
        return [
            Text(),
            Text.assemble(
                ("Recommended: int16", "bold"),
                f". Nothing smaller that was tried keeps the KL within {found.limit:g} and finds the facts that the float cache finds.",
            ),
        ]
    row = found.figures
    head = Text.assemble(
        ("Recommended", "bold"),
        f" for a KL of at most {found.limit:g}: {row.bits:.2f} bits on average (keys {row.k_bits:.2f}, values {row.v_bits:.2f}), "
        f"measured as a whole: KL {estimate_text(row.kl)}"
        + (f", {row.found} of {row.asked} facts found (float cache: {row.base_found})." if row.asked else "."),
    )
    uses = [Text(f"  {line}") for line in _uses(found.cache_format, check.sensitivity)]
    return [
        Text(),
        head,
        *uses,
        Text(),
        Text(found.format, "bold"),
    ]


def _uses(fmt: CacheFormat, found: Sensitivity | None) -> list[str]:
    """'keys: rotate+search@int4 in 20 layers, int8 in 10'."""
    if found is None:
        return []
    lines = []
    for which, name in (("k", "keys"), ("v", "values")):
        counted = Counter(str(fmt.side(layer, which)) for layer in found.heads)  # type: ignore[arg-type]
        parts = [f"{side} in {n} layer{'' if n == 1 else 's'}" for side, n in counted.most_common()]
        lines.append(f"{name}: {', '.join(parts)}")
    return lines
