"""`lowbit compare` that is interrupted: what is finished is kept, and the same command goes on from it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lowbit
from lowbit.errors import OutputError, SourceError
from lowbit.measure.compare import CompareRow
from tiny import save_tiny

RECIPES = ["w8", "w4", "int2:g32"]
TEXT = ["The cat sat on the mat and looked at the moon. " * 60]
HOW: dict[str, Any] = {"text": TEXT, "windows": 2, "length": 64}

# The command in a process of its own, which a signal meets in the second recipe.
INTERRUPTED = """
import os, signal, sys
from lowbit.measure import api
made, count, name = api.quantize, [0], sys.argv.pop(1)
def quantize(*arguments, **options):
    count[0] += 1
    if count[0] == 2:
        os.kill(os.getpid(), getattr(signal, name))
    return made(*arguments, **options)
api.quantize = quantize
from lowbit.cli.main import main
main()
"""


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a tiny model and a text in it."""
    save_tiny("llama", tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(TEXT[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def measured(rows: list[CompareRow]) -> list[Any]:
    """All that two runs of the same have in common: seconds differ."""
    return [
        (row.recipe, row.error, row.card and row.card.quality, row.card and row.card.parts.weight_bytes) for row in rows
    ]


def command(*before: str) -> list[str]:
    words = ["compare", "tiny", *RECIPES, "--text", "text.txt", "--windows", "2", "--length", "64", "--json"]
    return [sys.executable, *before, *words]


@pytest.mark.parametrize(("name", "code"), [pytest.param("SIGTERM", 143, marks=pytest.mark.slow), ("SIGINT", 130)])
def test_the_same_command_goes_on_from_what_was_finished(room: Path, name: str, code: int) -> None:
    before = set(room.iterdir())
    run = subprocess.run(command("-c", INTERRUPTED, name), capture_output=True, text=True)
    assert run.returncode == code and run.stdout == "", run.stderr
    assert "1 of 3 recipes is kept in tiny.compare.json, and the same command goes on from there" in run.stderr
    assert "Traceback" not in run.stderr and set(room.iterdir()) - before == {room / "tiny.compare.json"}
    kept = json.loads((room / "tiny.compare.json").read_text())
    assert len(kept["runs"]) == 1

    again = subprocess.run(command("-m", "lowbit.cli"), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert set(room.iterdir()) == before  # nothing is left of a run that ended well
    assert "(from the run before)" in again.stderr and "w8 (recipe 1 of 3)" not in again.stderr
    found = json.loads(again.stdout)
    assert [row.pop("earlier_run") for row in found] == [True, True, False, False]
    cards = next(iter(kept["runs"].values()))["rows"]
    assert [row["kl"] for row in found[:2]] == [
        cards[key]["quality"]["kl_mean"]["value"] for key in cards
    ]  # to the last digit
    # Another process may find another kernel the fastest, which adds up in another order.
    whole = json.loads(subprocess.run(command("-m", "lowbit.cli"), capture_output=True, text=True).stdout)
    for mine, other in zip(found, whole, strict=True):
        for key in ("recipe", "error", "verdict", "bits", "linear_bits", "mib"):
            assert mine[key] == other[key]
        assert mine["perplexity"] == pytest.approx(other["perplexity"], rel=1e-4)
        assert mine["kl"] == pytest.approx(other["kl"], rel=0.05, abs=1e-7)


def test_an_error_loses_nothing_either_and_rows_count_only_for_the_same(room: Path) -> None:
    def stop(row: CompareRow) -> None:
        if row.recipe == "w4":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        lowbit.compare("tiny", RECIPES, keep="rows.json", on_row=stop, **HOW)
    assert any("2 of 3 recipes are kept in rows.json" in note for note in caught.value.__notes__)
    other = lowbit.compare("tiny", ["w8"], keep="rows.json", **{**HOW, "windows": 1})
    assert not any(row.earlier for row in other)  # of one window, not of two
    again = lowbit.compare("tiny", [*RECIPES, "w4", "int3:g32"], keep="rows.json", **HOW)
    assert [row.earlier for row in again] == [True, True, True, False, True, False]
    fresh = lowbit.compare(
        "tiny", [*RECIPES, "w4", "int3:g32"], keep="rows.json", keep_after=False, text=TEXT, windows=2, length=63
    )
    assert not any(row.earlier for row in fresh) and len(json.loads(Path("rows.json").read_text())["runs"]) == 2
    assert measured(again) == measured(lowbit.compare("tiny", [*RECIPES, "w4", "int3:g32"], **HOW))


def test_figures_show_recipes_of_the_run_before_too(room: Path) -> None:
    pytest.importorskip("matplotlib")
    lowbit.compare("tiny", ["w8"], keep="rows.json", **HOW)
    rows = lowbit.compare("tiny", ["w8", "w4"], keep="rows.json", plots="whole", **HOW)
    assert [row.earlier for row in rows] == [True, True, False]
    lowbit.compare("tiny", ["w8", "w4"], plots="again", **HOW)
    assert Path("whole/weights.png").read_bytes() == Path("again/weights.png").read_bytes()


@pytest.mark.parametrize(
    "content", ["", "[]", '{"lowbit_compare": 1, "runs": [1]}', '{"lowbit_compare": 2, "runs": {}}']
)
def test_a_file_of_something_else_is_left_as_it_is(room: Path, content: str) -> None:
    Path("mine.json").write_text(content)
    with pytest.raises(SourceError, match=r"mine\.json"):
        lowbit.compare("tiny", ["w8"], keep="mine.json", **HOW)
    assert Path("mine.json").read_text() == content


def test_a_place_that_cannot_be_written_to_is_known_before_the_work(room: Path) -> None:
    with pytest.raises(OutputError, match="cannot be kept in"):
        lowbit.compare("tiny", ["w8"], keep="absent/rows.json", **HOW)


def test_what_is_at_work_is_told_with_totals_of_ones_own(room: Path) -> None:
    steps, counts = [], []
    lowbit.compare("tiny", ["w8", "w4"], on_step=steps.append, progress=lambda *each: counts.append(each), **HOW)
    said = list(dict.fromkeys(step.what for step in steps))
    assert said[-4:] == [
        f"{name} (recipe {i} of 2): {what}"
        for i, name in ((1, "w8"), (2, "w4"))
        for what in ("quantizing", "measuring")
    ]
    windows = [step for step in steps if step.unit == "windows"]
    assert {step.total for step in windows} == {2} and windows[-1].done == 2
    assert steps[-1].seconds_left == pytest.approx(0, abs=1) and counts[-1] == (6, 6)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
