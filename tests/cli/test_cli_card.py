"""What `quantize`, `evaluate`, `export` and `import` leave in a folder for people, and `card`, which prints it again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from lowbit.cli.main import app
from tiny import save_tiny


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model with a README of its own, a text, and `q`, quantized and measured by the commands."""
    room = tmp_path_factory.mktemp("cards")
    save_tiny("llama", room / "float")
    (room / "float/README.md").write_text("---\nlicense: mit\n---\n# The float model\n", "utf-8")
    (room / "text.txt").write_text("the cat and the hen are in the tree. " * 40)
    run("quantize", room / "float", "int2:g32", "-o", room / "q", "--no-card")
    return room


def evaluate(room: Path, *words: object) -> str:
    text = room / "text.txt"
    return run(
        "evaluate", room / "q", "--against", room / "float", "--text", text, "--length", 32, "--windows", 2, *words
    )


def test_the_example_of_the_help(room: Path) -> None:
    """`lowbit card FOLDER`: what evaluate printed comes back, at once and without a model being loaded."""
    assert "was not measured" in (room / "q/README.md").read_text("utf-8")
    said = run("card", room / "q", code=2)
    assert f"lowbit evaluate {room / 'q'} --against FLOAT_MODEL" in said.replace("\n", "")
    evaluate(room, "--no-save")
    assert not (room / "q/card.json").exists()
    printed = evaluate(room)
    assert run("card", room / "q").splitlines()[1:] == printed.splitlines()[1:]  # below the name, here without its path
    data, kept = json.loads(run("card", room / "q", "--json")), json.loads((room / "q/card.json").read_text("utf-8"))
    assert data == kept and data["folder"]["target"] == "lowbit"
    text = (room / "q/README.md").read_text("utf-8")
    assert run("card", room / "q", "--markdown") == text
    assert ModelCard(text).data.license == "mit" and "lowbit evaluate q --against float --text text.txt" in text
    assert str(room) not in text and str(room) not in (room / "q/card.json").read_text("utf-8")


def test_a_second_run_checks_and_says_what_was_measured(room: Path, tmp_path: Path) -> None:
    """The time of checking is none of quantizing, the card is that of the first run, and another text or window measures anew."""
    words = ["quantize", room / "float", "int4:g32", "-o", tmp_path / "q", "--windows", 2, "--text", room / "text.txt"]
    first = run(*words)
    took = json.loads((tmp_path / "q/card.json").read_text("utf-8"))["parts"]["quantize_seconds"]
    again = CliRunner().invoke(app, [str(word) for word in words])
    assert again.exit_code == 0 and "already done" in again.stderr and "quantizing" not in again.stderr
    assert re.search(r"became .* in [\d.]+ s \(.*/s\) bits per weight", " ".join(first.split()))
    assert "checked in" in again.stdout and "/s)" not in again.stdout.partition("bits per weight")[0]
    assert "measured before" in again.stdout and "measured before" not in first
    assert first.partition("╮")[2] == again.stdout.partition("╮")[2]  # below the name, here without its path
    (tmp_path / "q/card.json").unlink()
    data = json.loads(run(*words, "--json"))
    assert data["already_done"] and data["card"]["parts"]["quantize_seconds"] is None and took is not None
    words[words.index("--windows") + 1] = 1
    assert json.loads(run(*words, "--json"))["card"]["quality"]["windows"] == 1
    assert not json.loads(run(*words, "--json", "--overwrite"))["already_done"]


def test_how_much_is_measured(room: Path, tmp_path: Path) -> None:
    """--card quick, full and none, and what was `--card` and `--no-card` before; a quick card never stands in for a full one."""
    words = ["quantize", room / "float", "int4:g32", "-o", tmp_path / "q", "--text", room / "text.txt"]
    assert "card" not in json.loads(run(*words, "--json", "--card", "none"))
    assert "card" not in json.loads(run(*words, "--json", "--no-card"))
    quick = json.loads(run(*words, "--json", "--card"))["card"]
    assert quick["budget"] == 30.0 and quick["quality"]["windows"] == 4
    weights = (tmp_path / "q/model.safetensors").read_bytes()
    again = CliRunner().invoke(app, [str(word) for word in words])
    assert "measured before" in again.stdout and "measuring what that cost" not in again.stderr
    full = json.loads(run(*words, "--json", "--card", "full"))["card"]
    assert full["budget"] is None and full["quality"]["windows"] == 4 and full["speed"]["settings"]["prefill"] > 0
    assert "--card full" in (tmp_path / "q/README.md").read_text("utf-8")
    for more in (("--card", "full"), ("--card", "quick"), ("--windows", "4")):  # the full one stands in for less
        said = json.loads(run(*words, "--json", *more))
        assert said["card"]["budget"] is None, more
    assert json.loads(run(*words, "--json", "--windows", 3))["card"]["budget"] == 30.0
    assert json.loads(run(*words, "--json", "--card", "full"))["card"]["budget"] is None
    assert (tmp_path / "q/model.safetensors").read_bytes() == weights
    assert "contradict" in run(*words, "--card", "full", "--no-card", code=2)
    assert "is not one of" in run(*words, "--card", "much", code=2)


def test_what_a_user_wrote_stays_until_asked(room: Path) -> None:
    evaluate(room)
    (room / "q/README.md").write_text("# Mine\n", "utf-8")
    evaluate(room)
    assert (room / "q/README.md").read_text("utf-8") == "# Mine\n"
    run("card", room / "q", "--rewrite")
    assert "# q" in (room / "q/README.md").read_text("utf-8")


def test_weights_that_changed_make_the_card_late(room: Path, tmp_path: Path) -> None:
    evaluate(room)
    for file in (room / "q").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    raw = bytearray((tmp_path / "model.safetensors").read_bytes())
    raw[-3] ^= 255
    (tmp_path / "model.safetensors").write_bytes(raw)
    result = CliRunner().invoke(app, ["card", str(tmp_path)])
    assert result.exit_code == 0 and "out of date" in result.stderr and "out of date" not in result.stdout


def test_exports_that_are_folders_have_a_readme_and_files_have_none(room: Path, tmp_path: Path) -> None:
    words = ("--no-card", "--as")
    run("quantize", room / "float", "int4:g32", "-o", tmp_path / "served", *words, "vllm")
    data = ModelCard.load(tmp_path / "served/README.md").data
    assert "compressed-tensors" in data.tags and data.license == "mit"
    run("quantize", room / "float", "int4:g32,embed=keep", "-o", tmp_path / "k", "--no-card")
    run("export", tmp_path / "k", "--as", "gptq", "-o", tmp_path / "g")
    assert "vllm serve g" in (tmp_path / "g/README.md").read_text("utf-8")
    run("import", tmp_path / "g", "-o", tmp_path / "back")
    assert "lowbit import g" in (tmp_path / "back/README.md").read_text("utf-8")
    assert "one file" in run("card", room / "text.txt", code=2)


def test_the_same_command_writes_the_same_readme_where_nothing_is_measured(room: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run("quantize", room / "float", "w4", "-o", tmp_path / name / "q", "--no-card")
    assert (tmp_path / "a/q/README.md").read_bytes() == (tmp_path / "b/q/README.md").read_bytes()


def test_two_forms_at_once_are_refused(room: Path) -> None:
    assert "give one of them" in run("card", room / "q", "--json", "--markdown", code=2)
