"""`lowbit check-kv`: its screen, JSON, figure, what it writes, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import lowbit
from lowbit.cli.main import app
from tiny import save_tiny

SHORT = ["--context", "64", "--windows", "1", "--text", "text.txt"]


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a tiny model, its quantized form and a text."""
    save_tiny("llama", tmp_path / "tiny")
    lowbit.quantize(tmp_path / "tiny", "int8:g32", tmp_path / "packed")
    (tmp_path / "text.txt").write_text("The cat sat on the mat and looked at the moon. " * 60)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["check-kv", *words])


def test_the_screen_fits_80_columns_and_says_what_to_use(room: Path) -> None:
    done = run("tiny", "--kv", "int8", "--kv", "k=int8,v=int4:g8", *SHORT)
    assert done.exit_code == 0, done.output
    assert "Recommended" in done.stdout and "k=int8,v=int4:g8" in done.stdout and "by position" in done.stdout
    recommended = done.stdout.split("Recommended")[1]
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if line.strip() not in recommended)


def test_json_is_all_that_is_printed(room: Path) -> None:
    done = run("tiny", "--kv", "int8", "--no-recommend", "--json", *SHORT)
    told = json.loads(done.stdout)
    assert told["rows"][0]["format"] == "int8" and told["recommended"] is None and told["context"] == 64


def test_it_draws_the_drift_curve(room: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run("tiny", "--kv", "int4", "--no-recommend", "--plot", "drift.png", *SHORT)
    assert done.exit_code == 0, done.output
    assert (room / "drift.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_recommended_is_written_into_a_folder(room: Path) -> None:
    done = run("packed", "--kv", "int8", "--write", "--json", *SHORT)
    assert done.exit_code == 0, done.output
    chosen = json.loads(done.stdout)["recommended"]["format"]
    assert chosen in (room / "packed" / "config.json").read_text("utf-8")
    lowbit.load(room / "packed")
    again = json.loads(run("packed", "--no-recommend", "--json", *SHORT).stdout)
    assert [row["format"] for row in again["rows"] if row["name"] == "its own"] == [chosen]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny", "--write"], "--write is for a folder that lowbit quantized"),
        (["packed", "--write", "--no-recommend"], "leave --no-recommend out"),
        (["tiny", "--kv", "int9000"], "int9000"),
        (["tiny", "--kl", "0"], "is no limit"),
        (["tiny", "--context", "4"], "too short"),
    ],
)
def test_errors_are_one_sentence(room: Path, words: list[str], said: str) -> None:
    done = run(*words, "--text", "text.txt")
    assert done.exit_code == 2 and said in " ".join((done.output + (done.stderr or "")).split())
