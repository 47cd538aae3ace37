from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from measure_models import perturbed, tiny_llama

from lowbit.calibration.text import load_text
from lowbit.display import as_text
from lowbit.errors import EngineError, RecipeError
from lowbit.measure.card import CardParts
from lowbit.measure.compare import Built, CompareRow, compare
from lowbit.measure.compare_steps import CompareSteps
from lowbit.measure.quality import measure_quality
from lowbit.measure.speed import SpeedSettings
from lowbit.measure.windows import make_windows
from lowbit.planning.plan import QUANTIZED_SOURCE
from lowbit.report.comparison import Comparison
from lowbit.report.tables import compare_json, compare_records, markdown_compare

NOISE = {"little": 0.02, "much": 0.5}
BASE = CardParts("tiny", "float32", parameters=1000, bytes_after=4000)


def build(recipe):
    if recipe not in NOISE:
        raise RecipeError(f"unknown recipe {recipe!r}")
    return Built(perturbed(tiny_llama(), NOISE[recipe]), CardParts("tiny", recipe, parameters=1000, bytes_after=500))


@pytest.fixture(scope="module")
def windows(tokenizer, words):
    return make_windows(load_text([words]), tokenizer, length=50, limit=4)


def test_rows_are_those_of_single_measurements(windows):
    base = tiny_llama()
    rows = compare(["much", "wrong", "little"], build, base, BASE, windows)
    assert [row.recipe for row in rows] == ["float32", "much", "wrong", "little"]
    assert [row.is_base for row in rows] == [True, False, False, False]
    for row in (rows[1], rows[3]):
        assert row.card.quality == measure_quality(build(row.recipe)[0], windows, base=base)
        assert row.card.parts.recipe == row.recipe and row.card.text.sha256 == windows.text_sha256
    assert rows[0].card.quality.perplexity == measure_quality(base, windows).perplexity
    assert rows[0].card.quality.kl_mean.value == 0.0
    assert rows[2].card is None and "unknown recipe" in rows[2].error


def test_a_bug_is_not_a_row(windows):
    def broken(recipe):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compare(["little"], broken, tiny_llama(), BASE, windows)


@pytest.mark.parametrize("keep_bytes", [0, 2**31])
def test_base_runs_once_when_its_logits_are_kept(windows, keep_bytes):
    base, calls = tiny_llama(), []
    base.register_forward_hook(lambda *_: calls.append(1))
    compare(["little", "much"], build, base, BASE, windows, keep_bytes=keep_bytes)
    assert len(calls) == (4 if keep_bytes else 12)


def test_progress_and_rows_arrive_in_order(windows):
    steps, rows = [], []
    found = compare(
        ["little", "wrong"], build, tiny_llama(), BASE, windows,
        progress=lambda *each: steps.append(each), on_row=rows.append,
    )  # fmt: skip
    assert steps == [(i, 12) for i in (*range(1, 9), 12)]
    assert tuple(rows) == found


def test_speed_beside_the_base(windows):
    settings = SpeedSettings(prompt=4, new=3, prefill=8, batch=0, repeats=1)
    rows = compare(["little", "much"], build, tiny_llama(), BASE, windows, speed=settings)
    speeds = [row.card.speed for row in rows]
    assert speeds[0].model.decode == pytest.approx((speeds[1].base.decode + speeds[2].base.decode) / 2)
    assert speeds[0].ratio("decode") == 1.0
    assert all(each.settings == settings for each in speeds)
    assert markdown_compare(rows).endswith("; speed by transformers, float32; float by transformers, float32\n")


def test_a_program_that_does_not_run_costs_the_speed_and_nothing_else(windows):
    def backend():
        raise EngineError("out of order")

    def broken(recipe):
        return build(recipe)._replace(backend=backend)

    rows = compare(["little"], broken, tiny_llama(), BASE, windows, speed=SpeedSettings())
    assert rows[1].card.quality is not None and rows[1].card.speed.skipped == "out of order"
    assert rows[0].card.speed is None and "speed by" not in markdown_compare(rows)


def test_records_and_markdown(windows):
    rows = compare(["little", "wrong"], build, tiny_llama(), BASE, windows)
    records = compare_records(rows)
    assert records[1]["bits"] == 4.0 and records[1]["kl"] == rows[1].card.quality.kl_mean.value
    assert records[0]["verdict"] is None and records[1]["verdict"] in ("indistinguishable", "very close")
    assert records[2]["error"] and records[2]["kl"] is None
    assert json.loads(compare_json(rows)) == records
    lines = markdown_compare(rows).splitlines()
    widths = {line.count(" | ") for line in lines[:5] if line.startswith("|") and "---" not in line}
    assert len(widths) == 1
    assert "decode" not in lines[0]  # never measured, so no empty column
    assert f"{rows[1].card.quality.kl_mean.value:.5f}" in lines[3]
    assert "failed: unknown recipe" in lines[4]
    assert "4 windows of 50" in lines[-1]


def test_markdown_keeps_its_columns_whatever_an_error_says():
    text = markdown_compare([CompareRow("a|b", error="one | two\nthree")])
    assert len(text.strip().splitlines()) == 3
    assert "one \\| two three" in text and math.isfinite(len(text))


def test_quantizing_a_kept_recipe_again_says_why():
    told = []
    steps = CompareSteps(["w8", "w4"], 2, lambda step: told.append(step.what), kept={-1, 0}, redrawn=True)
    steps.begins(0, "quantizing")
    steps.begins(1, "quantizing")
    assert "w8 (recipe 1 of 2): quantizing again to draw its weights" in told
    assert "w4 (recipe 2 of 2): quantizing" in told


def test_one_window_and_a_quantized_source_are_said_below_the_table(windows):
    note = f"{QUANTIZED_SOURCE}, a file of 94 MiB; the size before is of its float values"
    plenty = compare(["little"], build, tiny_llama(), BASE, windows)
    assert "one window" not in markdown_compare(plenty) and "itself quantized" not in markdown_compare(plenty)
    card = plenty[1].card
    one = replace(card, parts=replace(card.parts, notes=("inputs: some", note)), text=replace(card.text, windows=1))
    base = replace(plenty[0].card, text=one.text)
    rows = [replace(plenty[0], card=base), replace(plenty[1], card=one), replace(plenty[1], recipe="other", card=one)]
    for text in (markdown_compare(rows), as_text(Comparison(rows), 80)):
        flat = " ".join(text.split())
        assert (
            "one window is little text, and its ± comes from its own blocks alone; use more windows for a claim" in flat
        )
        assert flat.count(note) == 1 and "inputs: some" not in flat
