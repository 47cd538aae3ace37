"""What the commands print, at several widths: nothing is cut, and every recipe and name is whole on one line."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

import lowbit
from lowbit.interchange.opening import open_source
from lowbit.measure.bench import Bench, BenchRow
from lowbit.measure.card import Card, CardParts
from lowbit.measure.compare import CompareRow
from lowbit.measure.quality import Estimate, Quality
from lowbit.measure.speed import SpeedSettings
from lowbit.recipes.presets import PRESETS
from lowbit.report import doctor
from lowbit.report.bench_view import render_bench
from lowbit.report.catalogue import KINDS, catalogue, matching
from lowbit.report.catalogue_view import render_catalogue, render_entries
from lowbit.report.doctor import KernelTrial
from lowbit.report.doctor_view import render_report
from lowbit.report.inspect import inspect_quantized, inspect_source, render_inspection
from lowbit.report.panel import render_card
from lowbit.report.plan_view import render_plan
from lowbit.report.tables import render_compare
from tiny import save_tiny

WIDTHS = pytest.mark.parametrize("width", [60, 80, 100, 140])
RECIPES = ["w4", "smooth(alpha=0.65)+search@int8:channel,a=minmax@int8:tensor,fallback=never",
           "search@uint3:g32:s=(uint6:g8):min=(int6:g8),embed=int6:g64,*.down_proj=int8:channel,*.layers.0.*=keep"]  # fmt: skip
Estimated = Estimate(0.0412, 0.0007)
QUALITY = Quality(
    kind="causal", tokens=100, windows=2, length=64, perplexity=Estimate(24.2, 0.4), base_perplexity=Estimate(23.5, 0.4),
    ratio=Estimate(1.03, 0.002), kl_mean=Estimated, kl_p99=Estimated, top1=Estimated,
)  # fmt: skip


def lines_of(item: object, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(item, crop=False)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


def check(lines: list[str], width: int, names: list[str]) -> None:
    """No ellipsis, no line over the width but a name alone, every name whole."""
    assert not any("…" in line for line in lines)
    for line in lines:
        assert cell_len(line) <= width or line.strip() in names, line
    for name in names:
        assert any(name in line for line in lines), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("screens") / "tiny"
    save_tiny("llama", path)
    return path


@WIDTHS
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_plan(folder: Path, width: int, every: bool, recipe: str) -> None:
    plan = lowbit.plan(str(folder), recipe)
    lines = lines_of(render_plan(plan, every=every, width=width), width)
    formats = {str(t.format) for t in plan.tensors if t.format is not None}
    names = [t.name for t in plan.tensors] if every else ["model.embed_tokens.weight"]
    check(lines, width, [*names, *formats, plan.recipe.title.split()[-1], str(folder)])


@WIDTHS
@pytest.mark.parametrize("every", [False, True])
def test_inspect(folder: Path, width: int, every: bool) -> None:
    found = inspect_source(open_source(str(folder)))
    lines = lines_of(render_inspection(found, every=every, width=width), width)
    check(lines, width, [*([t.name for t in found.tensors] if every else []), str(folder)])
    small = folder.parent / f"small-{width}-{every}"
    lowbit.quantize(folder, RECIPES[2], small)
    quantized = inspect_quantized(small)
    formats = [t.format for t in quantized.tensors if t.format]
    lines = lines_of(render_inspection(quantized, every=every, width=width), width)
    check(lines, width, [*formats, str(small), quantized.quantized or ""])


@WIDTHS
def test_compare_and_the_card(width: int) -> None:
    cards = [Card(CardParts("some/model", r, 134_515_008, bytes_after=10**8), quality=QUALITY) for r in RECIPES]
    rows = [CompareRow(r, card) for r, card in zip(RECIPES, cards, strict=True)]
    lines = lines_of(render_compare([*rows, CompareRow("int99", error="there is no such format")], width=width), width)
    check(lines, width, RECIPES)
    assert sum("noticeable" in line or "very close" in line for line in lines) >= len(RECIPES)
    for recipe, card in zip(RECIPES, cards, strict=True):
        check(lines_of(render_card(card), width), width, [recipe])


@WIDTHS
def test_bench(width: int) -> None:
    name = "a-folder-with-a-rather-long-name-for-its-recipe/model-Q4_K_M.gguf"
    values = {"decode": [100.0], "prefill": [1000.0], "batch": [300.0], "first_token": [1.5]}
    rows = [BenchRow(name, values, weight_bytes=10**8, read_share=0.8), BenchRow("short", values, note="slow today")]
    lines = lines_of(render_bench(Bench(rows, SpeedSettings(), 2, "a machine"), width=width), width)
    check(lines, width, [name, "short"])
    assert "slow" in " ".join(lines) and "1.50" in " ".join(lines)


@WIDTHS
@pytest.mark.parametrize("every", [False, True])
def test_doctor(width: int, every: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [KernelTrial("float", "float32", "dense", (100.0, 1000.0))]
    for recipe in doctor._RECIPES:
        trials.append(KernelTrial(recipe, "float32", "packed", (10.0, 500.0), chosen_for=(1,)))
        trials.append(KernelTrial(recipe, "float32", "torch-int8", (20000.0, 123.0), chosen_for=(64,)))
        trials.append(KernelTrial(recipe, "float32", "expand", (98765.0, 54321.0)))
        trials.append(KernelTrial(recipe, "float32", "other", declines="it multiplies something else"))
    monkeypatch.setattr(doctor, "_trials", lambda: trials)
    lines = lines_of(render_report(doctor.examine(), every=every, width=width), width)
    check(lines, width, [*doctor._RECIPES, "packed", "torch-int8", str(Path.cwd())])
    text = " ".join(lines)
    assert "10.0 x" in text and "8.1 x" in text and ("98765" in text) == every
    assert "float product takes 100 µs for 1 row, 1000 µs for 64 rows" in " ".join(text.split())


@WIDTHS
def test_recipes(width: int) -> None:
    entries = catalogue()
    examples = [line.strip() for line in lines_of(render_catalogue(entries, 1000), 1000) if line.startswith("    s")]
    assert len(examples) == 2
    check(lines_of(render_catalogue(entries, width), width), width, [*PRESETS, *examples])
    for kind in [*KINDS, "method", "gptq", "llama", "q"]:
        try:
            found, others = matching(entries, kind)
        except lowbit.LowbitError:
            continue
        lines = lines_of(render_entries(found, others, width), width)
        formulas = [line.strip() for e in found for line in e.details.splitlines() if line.startswith(" ")]
        whole = [text for e in found for what, text in e.facts if what in ("stands for", "with text", "written as")]
        check(lines, width, [*whole, *(e.name for e in found), *(formulas if len(found) <= 4 else [])])
