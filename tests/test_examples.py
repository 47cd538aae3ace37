"""The scripts of examples/ run as their first lines say, on models that need no network."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny import save_tiny

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def main(name: str, *arguments: Any, **options: Any) -> Any:
    """What the `main` of a script returns."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*arguments, **options)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_and_says_how_to_run_it(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) <= 60
    assert f"    python examples/{path.name}" in "\n".join(lines[:4])
    assert f"[{path.name}]({path.name})" in (EXAMPLES / "README.md").read_text("utf-8")


def test_a_fit_of_ones_own_is_used_by_recipes_and_cuts_the_error() -> None:
    # In a process of its own, as it adds a fit for as long as the process lives.
    done = subprocess.run([sys.executable, str(EXAMPLES / "custom_fit.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    absmax, own = (re.findall(r"0\.\d{4}", line) for line in done.stdout.splitlines())
    assert len(absmax) == len(own) == 2
    for theirs, ours in zip(absmax, own):
        assert 0.05 < float(ours) < 0.9 * float(theirs)


def test_a_model_of_ones_own_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = main("own_model", str(tmp_path / "spirals"))
    assert right["float32"] > 0.95 and right["int8:channel"] > 0.95 and right["int4:g32"] > 0.9
    assert (tmp_path / "spirals" / "lowbit.json").is_file()
    sizes = [
        (int(after), int(before)) for after, before in re.findall(r"(\d+) of (\d+) bytes", capsys.readouterr().out)
    ]
    assert len(sizes) == 3 and all(after < before / 3 for after, before in sizes)


def test_a_comparison_is_a_line_for_each_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny("llama", tmp_path / "model")
    recipes = ("absmax@int8:channel", "absmax@int4:channel", "minmax@int4:g32")
    found = main("comparison", str(tmp_path / "model"), recipes, windows=2, length=64)
    assert list(found)[1:] == list(recipes)
    assert 0 < found["absmax@int8:channel"] < found["absmax@int4:channel"]
    heading, _, *lines = capsys.readouterr().out.splitlines()
    assert "KL" in heading and [line.split()[0] for line in lines] == list(recipes)
    assert found["minmax@int4:g32"] is None and "needs an offset" in lines[-1]


def test_training_with_the_rounding_in_place_wins_back_what_rounding_lost(tmp_path: Path) -> None:
    loss = main("training", 40, str(tmp_path))
    assert loss["float"] < loss["trained by a loop"] < 0.9 * loss["quantized"]
    assert loss.get("trained by Trainer", 0) < 1.2 * loss["quantized"]  # it looks at the text in another order
    assert loss["packed"] == loss["trained by a loop"] and (tmp_path / "packed" / "lowbit.json").is_file()
