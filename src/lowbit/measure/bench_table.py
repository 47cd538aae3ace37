"""What `bench` found as text: columns, a caption, Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lowbit.measure.markdown import markdown_table

if TYPE_CHECKING:
    from lowbit.measure.bench import Bench, BenchRow

_MB = 1e6


def _number(value: float | None, form: str = ".0f") -> str:
    return "" if value is None else format(value, form)


def _rate(name: str) -> Callable[[BenchRow], str]:
    def rate(row: BenchRow) -> str:
        value = row.median(name)
        return _number(value, ".1f" if value is not None and value < 100 else ".0f")

    return rate


def _memory(row: BenchRow) -> str:
    return "" if row.startup is None else _number((row.startup.resident - row.startup.imported) / _MB)


def columns(bench: Bench) -> list[tuple[str, Callable[[BenchRow], str]]]:
    """(heading, text of a row); those in which no row has anything are left out."""
    s = bench.settings
    every: list[tuple[str, Callable[[BenchRow], str]]] = [
        ("program", lambda row: row.name),
        ("decode", _rate("decode")),
        ("of reading", lambda row: _number(row.read_share, ".0%")),
        (f"prefill {s.prefill}", _rate("prefill")),
        ("of int8 peak", lambda row: _number(row.product_share, ".0%")),
        (f"batch {s.batch}", _rate("batch")),
        ("first token s", lambda row: _number(row.median("first_token"), ".2f")),
        ("weights MB", lambda row: _number(None if row.weight_bytes is None else row.weight_bytes / _MB)),
        ("resident MB", _memory),
    ]
    return [(name, text) for name, text in every if any(text(row) for row in bench.rows)]


def caption(bench: Bench) -> str:
    """What the figures are."""
    s, rounds = bench.settings, len(bench.rows[0].values["decode"])
    text = (
        f"Tokens per second, medians of {rounds} round{'s' * (rounds != 1)} in which each program was measured once; {bench.threads} "
        f"thread{'s' * (bench.threads != 1)} each. decode: {s.new} tokens after {s.prompt}."
    )
    if any("batch" in row.values for row in bench.rows):
        text += f" batch: new tokens of {s.batch} sequences up to length {s.batch_length}."
    if any(row.startup for row in bench.rows):
        text += " first token: seconds until a fresh process has it; resident: the memory that it then holds, imports not counted."
    if bench.limits is not None:
        text += (
            f" This machine reads {bench.limits.read / 1e9:.1f} GB/s and takes {bench.limits.products / 1e9:.0f} G products "
            f"of bytes a second ({bench.isa}); decode must read the weights for each token, prefill takes one product for "
            "each weight and token."
        )
    return text


def notes(bench: Bench) -> list[str]:
    """What is out of the ordinary."""
    return [f"{row.name}: {row.note}" for row in bench.rows if row.note]


def markdown_bench(bench: Bench) -> str:
    """The same as Markdown."""
    shown = columns(bench)
    lines = [
        *markdown_table(
            [name for name, _ in shown], [[text(row) for _, text in shown] for row in bench.rows], ("program",)
        ),
        *(["", *notes(bench)] if notes(bench) else []),
        "",
        f"{caption(bench)} {bench.machine}.",
    ]
    return "\n".join(lines) + "\n"
