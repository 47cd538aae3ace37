from __future__ import annotations

import dataclasses
import io
import math
import re

import pytest
from measure_models import full_card
from rich.console import Console

from lowbit.measure.card import Card, CardParts
from lowbit.measure.compare import CompareRow
from lowbit.measure.quality import Estimate
from lowbit.measure.speed import Speed
from lowbit.report.panel import card_lines, estimate_text, render_card
from lowbit.report.tables import render_compare


def shown(item, width=110) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(item)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (0.0021, 0.0001, "0.00210 ± 0.00010"),
        (0.04126, 0.00072, "0.04126 ± 0.00072"),
        (23.5154, 1.81, "23.5 ± 1.8"),
        (1.0309, None, "1.031"),
        (0.0, 0.0, "0.000"),
        (12345.6, 210.0, "12346 ± 210"),
        (1e-9, None, "0.000000"),
        (math.inf, None, "inf"),
        (math.nan, math.nan, "nan ± nan"),
    ],
)
def test_estimates_show_the_digits_that_they_have(value, stderr, text):
    assert estimate_text(Estimate(value, stderr)) == text


def test_absent_and_scaled_estimates():
    assert estimate_text(None) == "-"
    assert estimate_text(Estimate(0.8818, 0.0031), " %", scale=100) == "88.18 ± 0.31 %"


def test_card_shows_every_figure():
    text = shown(render_card(full_card()))
    flat = re.sub(r"[\s│]+", " ", text)
    for piece in (
        "smollm2", "rtn@int4:g32", "very close", "99.97 %", "norms: 1-D",
        "513 MiB → 87.5 MiB", "5.9 times smaller", "5.35 in all, 4.50 in the linear layers",
        "23.52 → 24.24", "ratio 1.0309 ± 0.0021", "0.04126 ± 0.00072 nats/token",
        "above 0.310 ± 0.020 nats", "88.18 ± 0.31 % of tokens", "32.5 tokens/s, 2.00 x the float model",
        "20 sequences at once", "12.3 s", "900 MiB quantizing, 400 MiB running", "24 windows of 1024 tokens",
        "abababab", "windows of 512", "a note", "Because of [bold]air[/bold].", "2 cores",
    ):  # fmt: skip
        assert piece in flat, piece
    assert max(len(line) for line in text.splitlines()) <= 110


def test_narrow_terminal_loses_nothing():
    flat = re.sub(r"[\s│]+", "", shown(render_card(full_card()), width=60))
    assert "0.04126±0.00072nats/token" in flat and "2.00xthefloatmodel" in flat


def test_what_was_not_measured_is_not_shown():
    card = Card(CardParts("model", "w4"))
    assert card_lines(card) == []
    assert "None" not in shown(render_card(card)) and "nan" not in shown(render_card(card))
    skipped = dict(card_lines(dataclasses.replace(card, speed=Speed(skipped="BERT does not generate"))))
    assert skipped == {"speed": "not measured: BERT does not generate"}


def test_kind_is_explained_unless_causal():
    quality = dataclasses.replace(full_card().quality, kind="masked")
    assert "pseudo-perplexity" in dict(card_lines(full_card(quality=quality)))["  scored as"]
    assert "  scored as" not in dict(card_lines(full_card()))


def test_comparison_keeps_order_and_shows_failures():
    base = full_card(parts=CardParts("smollm2", "float32", 134_515_008, bytes_after=538_000_000))
    rows = [
        CompareRow("float32", base, is_base=True),
        CompareRow("w4", full_card()),
        CompareRow("[w9]", error="no such preset; did you mean 'w8'?"),
    ]
    text = shown(render_compare(rows), width=200)
    order = [text.index(name) for name in ("float32", "w4", "[w9]")]
    assert order == sorted(order)
    assert "[w9] failed: no such preset; did you mean 'w8'?" in text
    line = next(line for line in text.splitlines() if "w4" in line)
    for piece in (
        "5.35",
        "4.50",
        "87.5",
        "24.241",
        "1.0309",
        "0.04126",
        "0.00072",
        "88.18",
        "32.5",
        "2.00",
        "very",
    ):
        assert piece in line, piece
    assert "24 windows of 1024 tokens" in text


@pytest.mark.parametrize("width", [72, 80, 100, 120, 140])
def test_a_narrow_comparison_leaves_columns_out_instead_of_cutting(width):
    rows = [CompareRow("float32", full_card(), is_base=True), CompareRow("gptq@int4:g64", full_card())]
    text = shown(render_compare(rows, width=width), width=width)
    assert "…" not in text
    for piece in ("gptq@int4:g64", "5.35", "24.241", "0.04126", "88.18", "very close"):
        assert piece in text, piece
    assert ("700" in text) == (width == 140)


def test_speeds_of_an_earlier_run_are_said_to_be_that():
    rows = [CompareRow("w8", full_card(), earlier=True), CompareRow("w4", full_card())]
    assert "speeds of w8 are from an earlier run" in re.sub(
        r"\s+", " ", shown(render_compare(rows, width=80), width=80)
    )
    assert "earlier run" not in shown(render_compare([dataclasses.replace(row, earlier=True) for row in rows]))


def test_columns_are_explained_once_and_only_those_that_are_shown():
    flat = re.sub(r"\s+", " ", shown(render_compare([CompareRow("w4", full_card())], width=72), width=72))
    assert flat.count("nats per token, lower is better") == 1 and "same first choice of the next token" in flat
    assert "batch:" not in flat and "batch:" in shown(render_compare([CompareRow("w4", full_card())]), width=250)


def test_rows_that_fit_no_table_are_lines_with_whole_recipes():
    recipe = "awq+gptq@int4:g64,*.down_proj=int8:channel,*.layers.0.*=keep"
    text = shown(
        render_compare([CompareRow("float32", full_card(), is_base=True), CompareRow(recipe, full_card())], width=80),
        80,
    )
    assert recipe in text.splitlines() and "0.04126 ± 0.00072" in text and max(map(len, text.splitlines())) <= 80


def test_comparison_writes_ruin_readably():
    quality = dataclasses.replace(full_card().quality, perplexity=Estimate(3.2e11), kl_mean=Estimate(math.nan))
    text = shown(render_compare([CompareRow("w1", full_card(quality=quality))]), width=200)
    assert "3.2e+11" in text and "nan" in text and "damaged" in text
