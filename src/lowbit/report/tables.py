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
from lowbit.report.layout import Lines, table_or_list, wrapped
from lowbit.report.panel import ABSENT, VERDICT_COLOURS, rate_text

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class _Column:
    """A column of the comparison: its heading, its key in JSON rows, and how its value is written."""

    heading: str
    key: str
    write: Callable[[float], str]


_COLUMNS = (
    _Column("bits/ weight", "bits", lambda value: f"{value:.2f}"),
    _Column("linear bits", "linear_bits", lambda value: f"{value:.2f}"),
    _Column("MiB", "mib", lambda value: f"{value:.1f}"),
    _Column("perplexity", "perplexity", lambda value: f"{value:.3f}" if value < 1e5 else f"{value:.3g}"),
    _Column("ratio", "ratio", lambda value: f"{value:.4f}" if value < 1e3 else f"{value:.3g}"),
    _Column("KL", "kl", lambda value: f"{value:.5f}" if value < 10 else f"{value:.3g}"),
    _Column("±", "kl_stderr", lambda value: f"{value:.5f}" if value < 10 else f"{value:.2g}"),
    _Column("top-1 %", "top1", lambda value: f"{100 * value:.2f}"),
    _Column("decode tok/s", "decode", rate_text),
    _Column("x float", "decode_ratio", lambda value: f"{value:.2f}"),
    _Column("prefill tok/s", "prefill", rate_text),
    _Column("batch tok/s", "batch", rate_text),
    _Column("quantize s", "quantize_seconds", lambda value: f"{value:.1f}"),
)
_UNBOUNDED = 1000  # columns
# What a narrow terminal can do without, the least missed first.
_EXPENDABLE = ("batch", "prefill", "quantize_seconds", "kl_stderr", "decode_ratio", "linear_bits", "mib", "decode")


def compare_records(rows: Sequence[CompareRow]) -> list[dict[str, Any]]:
    """One flat record per row, for JSON and for the tables; what was not measured is None."""
    return [_record(row) for row in rows]


def compare_json(rows: Sequence[CompareRow]) -> str:
    """The records as a JSON list; numbers that are not finite are written as text."""
    return json.dumps(json_ready(compare_records(rows)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _with_records(rows: Sequence[CompareRow]) -> Iterator[tuple[CompareRow, dict[str, Any]]]:
    return zip(rows, compare_records(rows), strict=True)


def _record(row: CompareRow) -> dict[str, Any]:
    record: dict[str, Any] = {"recipe": row.recipe, "error": row.error, "verdict": None}
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
    """The comparison as a table, rows in the order given, the float model's set apart; errors below it.

    `width` in characters: columns that matter less are left out until the table fits, and where it does not, it is a list.
    """
    from rich.console import Group
    from rich.text import Text

    width = _UNBOUNDED if width is None else width
    columns, cells = _cells(rows)
    words = ["failed" if row.error else record["verdict"] or "" for row, record in _with_records(rows)]
    headings = ["recipe", *(column.heading.replace(" ", "\n") for column in columns), "verdict"]
    expendable = [column.heading.replace(" ", "\n") for key in _EXPENDABLE for column in columns if column.key == key]
    body = [
        [Text(row.recipe), *map(Text, values), Text(word, style=VERDICT_COLOURS.get(word, "red"))]
        for row, word, values in zip(rows, words, cells, strict=True)
    ]
    base = [number for number, row in enumerate(rows) if row.is_base]
    table = table_or_list(
        headings, body, width, expendable=expendable, left=("recipe", "verdict"), dim=base, ruled=base
    )  # fmt: skip
    said = [Text(caption, "italic")] if (caption := _caption(rows)) else []
    said += [Text.assemble((f"{row.recipe} failed: ", "red"), row.error) for row in rows if row.error]
    return Group(table, Lines([line for text in said for line in wrapped(text, width)]))


def markdown_compare(rows: Sequence[CompareRow]) -> str:
    """The same table as Markdown text, with a line below it that says what was measured on."""
    columns, cells = _cells(rows)
    headings = ["recipe", *(column.heading.replace("/ ", "/") for column in columns), "verdict"]
    verdicts = [f"failed: {row.error}" if row.error else r["verdict"] or "" for row, r in _with_records(rows)]
    table = [[f"`{row.recipe}`", *values, last] for row, values, last in zip(rows, cells, verdicts, strict=True)]
    lines, caption = markdown_table(headings, table, left=("recipe", "verdict")), _caption(rows)
    return "\n".join([*lines, *(["", caption] if caption else [])]) + "\n"


def _caption(rows: Sequence[CompareRow]) -> str | None:
    for row in rows:
        if row.card is not None and row.card.text is not None:
            text = row.card.text
            windows = f"{text.windows} window{'s' * (text.windows != 1)} of {text.length} tokens"
            caption = f"{row.card.parts.model} on {text.name}, {windows}; KL in nats per token"
            return "; ".join([caption, *_programs(rows)])
    return None


def _programs(rows: Sequence[CompareRow]) -> list[str]:
    """What ran the recipes and the float model, where speed was measured."""
    speeds = [row.card.speed for row in rows if row.card is not None and row.card.speed is not None and not row.is_base]
    mine = dict.fromkeys(speed.program for speed in speeds if speed.program is not None)
    base = dict.fromkeys(speed.base_program for speed in speeds if speed.base_program is not None)
    said = [f"speed by {' and '.join(mine)}"] if mine else []
    return said + ([f"float by {' and '.join(base)}"] if base else [])
