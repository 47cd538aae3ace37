"""Comparisons of many recipes as tables: on the terminal, as Markdown, and as rows for JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowbit.measure.card import json_ready
from lowbit.measure.compare import CompareRow
from lowbit.measure.markdown import markdown_table
from lowbit.measure.verdict import verdict
from lowbit.planning.plan import QUANTIZED_SOURCE
from lowbit.report.layout import Lines, columns_shown, table_or_list, wrapped
from lowbit.report.panel import ABSENT, VERDICT_COLOURS, estimate_text, rate_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text


@dataclass(frozen=True)
class _Column:
    """A column of the comparison: its heading, its key in JSON rows, how its value is written, and what it is."""

    heading: str
    key: str
    write: Callable[[float], str]
    meaning: str = ""


_COLUMNS = (
    _Column("bits/ weight", "bits", lambda value: f"{value:.2f}", "bits/weight: the weight files over all parameters"),
    _Column("linear bits", "linear_bits", lambda value: f"{value:.2f}", "linear bits: the same in the linear layers alone"),
    _Column("MiB", "mib", lambda value: f"{value:.1f}"),
    _Column(
        "perplexity", "perplexity", lambda value: f"{value:.3f}" if value < 1e5 else f"{value:.3g}",
        "perplexity: how surprised the model is by the text, lower is better",
    ),
    _Column(
        "ratio", "ratio", lambda value: f"{value:.4f}" if value < 1e3 else f"{value:.3g}",
        "ratio: perplexity over the float model's",
    ),
    _Column(
        "KL", "kl", lambda value: f"{value:.5f}" if value < 10 else f"{value:.3g}",
        "KL: how far the predictions of the next token moved from the float model's, in nats per token, lower is better",
    ),
    _Column(
        "±", "kl_stderr", lambda value: f"{value:.5f}" if value < 10 else f"{value:.2g}",
        "±: one standard error of KL, over windows, or over blocks of tokens where windows are few",
    ),
    _Column(
        "top-1 %", "top1", lambda value: f"{100 * value:.2f}",
        "top-1 %: how often both models have the same first choice of the next token",
    ),
    _Column("decode tok/s", "decode", rate_text, "decode: tokens per second of one answer"),
    _Column("x float", "decode_ratio", lambda value: f"{value:.2f}", "x float: decode over the float model's in the same rounds"),
    _Column("prefill tok/s", "prefill", rate_text, "prefill: tokens per second of a prompt"),
    _Column("batch tok/s", "batch", rate_text, "batch: tokens per second of many answers at once"),
    _Column("quantize s", "quantize_seconds", lambda value: f"{value:.1f}"),
)  # fmt: skip
_UNBOUNDED = 1000  # columns
# What a narrow terminal can do without, the least missed first.
_EXPENDABLE = (
    "batch", "prefill", "quantize_seconds", "kl_stderr", "decode_ratio", "linear_bits", "mib", "decode", "ratio",
    "perplexity",
)  # fmt: skip


def compare_records(rows: Sequence[CompareRow]) -> list[dict[str, Any]]:
    """One flat record per row, for JSON and for the tables; what was not measured is None."""
    return [_record(row) for row in rows]


def row_line(row: CompareRow) -> str:
    """A row in one line, for those who watch: what it costs in size and in quality."""
    if row.card is None:
        return f"{row.recipe} failed: {row.error}"
    quality, bits = row.card.quality, row.card.parts.bits
    figures = [] if bits is None or row.is_base else [f"{bits:.2f} bits per weight"]
    if quality is not None and row.is_base:
        figures.append(f"perplexity {estimate_text(quality.perplexity)}")
    elif quality is not None:
        found = verdict(quality)
        figures.append(f"KL {estimate_text(quality.kl_mean)}{'' if found is None else f', {found.word}'}")
    earlier = " (from the run before)" if row.earlier else ""
    return f"{'the float model' if row.is_base else row.recipe}: {', '.join(figures)}{earlier}"


def compare_json(rows: Sequence[CompareRow]) -> str:
    """The records as a JSON list; numbers that are not finite are written as text."""
    return json.dumps(json_ready(compare_records(rows)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _with_records(rows: Sequence[CompareRow]) -> Iterator[tuple[CompareRow, dict[str, Any]]]:
    return zip(rows, compare_records(rows), strict=True)


def _record(row: CompareRow) -> dict[str, Any]:
    record: dict[str, Any] = {"recipe": row.recipe, "error": row.error, "verdict": None, "earlier_run": row.earlier}
    record |= {column.key: None for column in _COLUMNS}
    if row.card is None:
        return record
    parts, quality, speed = row.card.parts, row.card.quality, row.card.speed
    nbytes = parts.bytes_after if parts.bytes_after is not None else parts.weight_bytes
    record |= {"bits": parts.bits, "linear_bits": parts.linear_bits, "quantize_seconds": parts.quantize_seconds}
    record["mib"] = None if nbytes is None else nbytes / 2**20
    if quality is not None:
        pairs = {"perplexity": quality.perplexity, "ratio": quality.ratio, "kl": quality.kl_mean}
        pairs["top1"] = quality.top1
        record |= {key: None if value is None else value.value for key, value in pairs.items()}
        record["kl_stderr"] = None if quality.kl_mean is None else quality.kl_mean.stderr
        found = verdict(quality)
        record["verdict"] = found.word if found is not None and not row.is_base else None
    if speed is not None and speed.model is not None:
        record |= {name: getattr(speed.model, name) for name in ("decode", "prefill", "batch")}
        record["decode_ratio"] = speed.ratio("decode")
    return record


def _cells(rows: Sequence[CompareRow]) -> tuple[list[_Column], list[list[str]]]:
    """The columns that have a value in some row, and the written values of every row."""
    records = compare_records(rows)
    columns = [column for column in _COLUMNS if any(record[column.key] is not None for record in records)]
    cells = [[ABSENT if r[c.key] is None else c.write(r[c.key]) for c in columns] for r in records]
    return columns, cells


def render_compare(rows: Sequence[CompareRow], *, width: int | None = None) -> RenderableType:
    """The comparison as a table, rows in the order given, the float model's set apart; below it what its columns are, and errors.

    `width` in characters: columns that matter less are left out until the table fits, and where it does not, it is a list.
    """
    from rich.console import Group
    from rich.text import Text

    room = _UNBOUNDED if width is None else width
    columns, cells = _cells(rows)
    words = ["failed" if row.error else record["verdict"] or "" for row, record in _with_records(rows)]
    headings = ["recipe", *(column.heading.replace(" ", "\n") for column in columns), "verdict"]
    expendable = [column.heading.replace(" ", "\n") for key in _EXPENDABLE for column in columns if column.key == key]
    body = [
        [Text(row.recipe), *map(Text, values), Text(word, style=VERDICT_COLOURS.get(word, "red"))]
        for row, word, values in zip(rows, words, cells, strict=True)
    ]
    shown = columns_shown(headings, body, room, expendable)
    explained = [columns[i - 1] for i in shown or range(len(headings)) if 0 < i <= len(columns)]
    if not shown and "±" in headings:  # in a list an error stands beside its value
        headings, body = _joined(headings, body)
    base = [number for number, row in enumerate(rows) if row.is_base]
    table = table_or_list(
        headings, body, room, expendable=expendable, left=("recipe", "verdict"), dim=base, ruled=base
    )  # fmt: skip
    said = [Text(line, style="dim") for line in (*_caption(rows), _meanings(explained))]
    said += [Text.assemble((f"{row.recipe} failed: ", "red"), row.error) for row in rows if row.error]
    if width is None:  # wrapped by whatever prints it
        return Group(table, *said)
    return Group(table, Lines([line for text in said for line in wrapped(text, width)]))


def _joined(headings: list[str], body: list[list[Text]]) -> tuple[list[str], list[list[Text]]]:
    """The same without a column of errors: each stands in the cell before it, as in `0.041 ± 0.001`."""
    at = headings.index("±")
    for row in body:
        if row[at].plain != ABSENT:
            row[at - 1].append(f" ± {row[at].plain}")
    return headings[:at] + headings[at + 1 :], [row[:at] + row[at + 1 :] for row in body]


def markdown_compare(rows: Sequence[CompareRow]) -> str:
    """The same table as Markdown text, with lines below it that say what its columns are and what was measured on."""
    columns, cells = _cells(rows)
    headings = ["recipe", *(column.heading.replace("/ ", "/") for column in columns), "verdict"]
    verdicts = [f"failed: {row.error}" if row.error else r["verdict"] or "" for row, r in _with_records(rows)]
    table = [[f"`{row.recipe}`", *values, last] for row, values, last in zip(rows, cells, verdicts, strict=True)]
    lines = markdown_table(headings, table, left=("recipe", "verdict"))
    below = [line for line in (_meanings(columns), *_caption(rows)) if line]
    return "\n".join([*lines, *(part for line in below for part in ("", line))]) + "\n"


def _meanings(columns: Sequence[_Column]) -> str:
    """What the columns are, in one line."""
    return "; ".join(column.meaning for column in columns if column.meaning)


def _caption(rows: Sequence[CompareRow]) -> list[str]:
    """What was measured on, and what is to be known of the speeds."""
    text = next((row.card.text for row in rows if row.card is not None and row.card.text is not None), None)
    if text is None:
        return []
    model = next(row.card.parts.model for row in rows if row.card is not None)
    windows = f"{text.windows} window{'s' * (text.windows != 1)} of {text.length} tokens"
    notes = [f"note: {note}" for note in (*text.notes, *_about_source(rows))]
    if text.windows == 1 and any(
        row.card is not None and row.card.quality is not None for row in rows if not row.is_base
    ):
        notes.append(
            "one window is little text, and its ± comes from its own blocks alone; use more windows for a claim"
        )
    return ["; ".join([f"{model} on {text.name}, {windows}", *_programs(rows)]), *notes, *_earlier(rows)]


def _about_source(rows: Sequence[CompareRow]) -> list[str]:
    """What the recipes' cards say of a source that is itself quantized, once."""
    every = [note for row in rows if row.card is not None for note in row.card.parts.notes]
    return list(dict.fromkeys(note for note in every if note.startswith(QUANTIZED_SOURCE)))


def _earlier(rows: Sequence[CompareRow]) -> list[str]:
    """Which speeds are of another run than the others."""
    timed = [row for row in rows if row.card is not None and row.card.speed is not None and not row.is_base]
    earlier = [row.recipe for row in timed if row.earlier]
    if not earlier or len(earlier) == len(timed):
        return []
    return [
        f"speeds of {', '.join(earlier)} are from an earlier run: hold them against others by `x float`, not by tokens per second"
    ]


def _programs(rows: Sequence[CompareRow]) -> list[str]:
    """What ran the recipes and the float model, where speed was measured."""
    speeds = [row.card.speed for row in rows if row.card is not None and row.card.speed is not None and not row.is_base]
    mine = dict.fromkeys(speed.program for speed in speeds if speed.program is not None)
    base = dict.fromkeys(speed.base_program for speed in speeds if speed.base_program is not None)
    said = [f"speed by {' and '.join(mine)}"] if mine else []
    return said + ([f"float by {' and '.join(base)}"] if base else [])
