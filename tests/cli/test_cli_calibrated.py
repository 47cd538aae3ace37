"""quantize with calibration text and with targets, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowbit.cli.main import app
from lowbit.interchange.files.settings import read_json
from lowbit.measure.subject import folder_parts
from tiny import save_tiny

TEXT = "the man in the rain and another thing in the train ran on and on " * 60


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    save_tiny("llama", path / "float")
    (path / "text.txt").write_text(TEXT)
    return path


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    return done.exit_code, done.output


def test_w4_with_text_is_the_calibrated_recipe(room: Path) -> None:
    code, said = run(
        "quantize", room / "float", "w4", "-o", room / "w4", "--calibration", room / "text.txt", "--samples", 4,
        "--no-card", "--json",
    )  # fmt: skip
    assert code == 0, said
    told = json.loads(said[said.index("{") :])
    assert told["plan"]["recipe"] == "qronos@int4:g32"
    assert read_json(room / "w4" / "lowbit.json")["calibration"]["windows"] == 4


def test_a_target_in_bits_is_met_from_below(room: Path) -> None:
    arguments = (
        "quantize", room / "float", "gptq@int4:g32", "--calibration", room / "text.txt", "--samples", 8, "--no-card",
        "--json", "--target-bits", 5.0, "--sensitivity", room / "s.json",
    )  # fmt: skip
    code, said = run(*arguments, "-o", room / "mixed")
    assert code == 0, said
    bits = json.loads(said[said.index("{") :])["plan"]["linear_bits_per_weight"]
    assert 4.5 < bits <= 5.0 and (room / "s.json").is_file()
    before = (room / "s.json").read_bytes()
    code, _ = run(*arguments, "-o", room / "mixed2")
    assert code == 0 and (room / "s.json").read_bytes() == before
    assert (room / "mixed" / "lowbit.json").read_bytes() == (room / "mixed2" / "lowbit.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data-free", "--samples", "4"], "would be ignored"),
        (["--data-free", "--effort", "high"], "exclude each other"),
        (["--effort", "most"], "is unknown"),
        (["--target-bits", "4", "--target-kl", "0.1"], "exclude each other"),
        (["--context", "1000"], "belongs to --fit-memory"),
        (["--sensitivity", "x.json"], "without a target"),
        (["--calibration", "no-such-file.txt"], "no-such-file.txt"),
    ],
)
def test_options_that_would_be_ignored_are_errors(room: Path, options: list[str], message: str) -> None:
    code, said = run("quantize", room / "float", "w4", "-o", room / "never", *options)
    assert code == 2 and message in " ".join(said.split()) and not (room / "never").exists()


def test_layers_that_are_not_static_are_shown(room: Path) -> None:
    """By the plan as a possibility, then by what quantized, by the card of a folder and by inspect as they are."""
    recipe = "absmax@int8:channel,a=minmax@int8:tensor,fallback=int8:g16:over=1"
    planned = " ".join(run("plan", room / "float", recipe)[1].split())
    assert (
        "layers int8:tensor:static; int8:g16:over=1 where calibration text shows that a fixed range would be far too wide"
        in planned
    )
    out, text = room / "static", room / "text.txt"
    _, said = run("quantize", room / "float", recipe, "-o", out, "--calibration", text, "--no-card", "--json")
    told = json.loads(said[said.index("{") :])
    ranges = told["plan"]["ranges"]
    count = len(ranges["exploded"])
    assert count and ranges["static"] == 0 and told["plan"]["inputs"] == {"int8:g16": count}
    facts = {t["name"]: t["inputs"] for t in json.loads(run("inspect", out, "--json")[1])["tensors"]}
    assert {n for n, inputs in facts.items() if inputs == "int8:g16"} == set(ranges["exploded"])
    notes = folder_parts(out).notes
    assert (
        len(notes) == 1
        and f"{count} of {count} find their scales while running, because their largest input is over 1 times"
        in notes[0]
    )
    listed = json.loads(run("recipes", "--json")[1])
    assert listed["fallback"] == "int8:g64:over=32" and listed["ranges"]["percentile"] == {"p": 99.99}
