"""Damaged files through the commands that read them: refused in one sentence or run, and nothing else (see run.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).parent / "run.py"
DOORS = ("config", "families", "packed", "foreign", "metadata", "gguf", "safetensors", "index", "words", "template")
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory and time are limited by Linux's means")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz") / "models"
    subprocess.run([sys.executable, str(RUN.with_name("models.py")), str(root)], check=True, capture_output=True)
    return root


def run(models: Path, keep: Path, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(RUN), "--models", str(models), "--keep", str(keep), "--json", *options],
        capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(found: dict[str, Any], count: int, keep: Path) -> None:
    shown = "\n".join(
        f"{b['door']} {b['number']} ({b['model']}) {b['command']}: {b['what']}" for b in found["bad"][:20]
    )
    assert not found["bad"], f"{len(found['bad'])} bad ends of {count} inputs, kept in {keep}\n{shown}"
    inputs, refused, fine = (sum(counts[i] for counts in found["counts"].values()) for i in range(3))
    assert inputs >= count and refused > count / 4 and fine > count / 50


@linux
def test_a_few_damaged_files(models: Path, tmp_path: Path) -> None:
    check(run(models, tmp_path, "--count", "30", "--seed", "1"), 30, tmp_path)


@linux
def test_what_a_bad_end_is_is_seen(models: Path, tmp_path: Path) -> None:
    """Commands that end as none may are counted, each for what it is, and the input is kept."""
    code = f"""
import sys; sys.path[:0] = [{str(RUN.parent)!r}]
import json, os, run
from pathlib import Path
import lowbit.cli.main as cli
def ends():
    kind = sys.argv[1]
    if kind == "traceback": raise KeyError("x")
    if kind == "signal": os.abort()
    if kind == "hang":
        while True: pass
    if kind == "memory":
        sys.stderr.write("error: not enough memory\\n"); sys.exit(2)
    if kind == "silent": sys.exit(2)
    if kind == "left":
        Path(sys.argv[2]).write_text("x"); sys.stderr.write("error: no\\n"); sys.exit(2)
    if kind == "refused":
        sys.stderr.write("error: no\\n"); sys.exit(2)
cli.main = ends
run.SECONDS = 1
kinds = ("traceback", "signal", "hang", "memory", "silent", "left", "refused", "fine")
run.DOORS["x"] = run.Door(("float/llama",), ("config.json",), lambda raw, rng: raw, kinds)
run.command = lambda kind, model, room: ([kind, str(room / "made")], room / "made" if kind == "left" else None)
counts = run.fuzz("x", range(1), 1, Path({str(models)!r}), Path({str(tmp_path)!r}), every=True)
print(json.dumps([counts.refused, counts.fine, {{b.command: b.what for b in counts.bad}}, [p.name for p in Path({str(tmp_path)!r}).iterdir()]]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    refused, fine, bad, kept = json.loads(done.stdout.splitlines()[-1])
    assert (refused, fine, kept) == (1, 1, ["x-1-0"])
    words = {
        "traceback": "traceback",
        "signal": "SIGABRT",
        "hang": "longer",
        "memory": "memory",
        "silent": "0 error lines",
        "left": "left made",
    }
    assert set(bad) == set(words) and all(words[kind] in bad[kind] for kind in words)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_many_damaged_files(door: str, models: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """pytest -m slow tests/fuzz --fuzz-count 10000 --fuzz-seed 7: so many inputs in all, shared by the doors."""
    count = -(-int(request.config.getoption("--fuzz-count")) // len(DOORS))
    seed = str(request.config.getoption("--fuzz-seed"))
    check(run(models, tmp_path, "--count", str(count), "--seed", seed, "--door", door), count, tmp_path)
