"""What --help prints: sections, short types, whole words and lines that can be copied, at 80 columns."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
import typer.main
from rich.cells import cell_len
from typer.testing import CliRunner

from lowbit.cli.help import BASIC, FEW, SECTIONS
from lowbit.cli.main import app

GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands  # type: ignore[attr-defined]
FORMS = ["", *COMMANDS]


def shown(command: str, width: int = 80) -> list[str]:
    result = CliRunner().invoke(
        app, [*([command] if command else []), "--help"], env={"COLUMNS": str(width)}, prog_name="lowbit"
    )
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def own_options(command: str) -> list[object]:
    return [p for p in COMMANDS[command].params if p.param_type_name == "option" and p.name != "help"]


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize("command", FORMS)
def test_lines_fit_and_no_word_is_cut(command: str, width: int) -> None:
    examples = [line for line in shown(command, width) if line.startswith(("  lowbit ", "Example:"))]
    lines = shown(command, width)
    assert all(cell_len(line) <= width or line in examples for line in lines)
    assert not any("…" in line for line in lines)
    assert " ".join(lines).split() == " ".join(shown(command, 1000)).split(), "the same words at any width"


@pytest.mark.parametrize("command", FORMS)
def test_examples_fit_into_80_columns_and_are_each_on_a_line(command: str) -> None:
    text = "\n".join(shown(command))
    said = re.split(r"^Examples?:", text, flags=re.MULTILINE)[1:]
    assert len(said) == (1 if command else 0)
    for line in said[0].strip().splitlines() if said else ():
        assert line.strip().startswith(f"lowbit {command}") and cell_len(line) <= 80
        assert shlex.split(line)[:2] == ["lowbit", command]


@pytest.mark.parametrize("command", COMMANDS)
def test_many_options_have_sections(command: str) -> None:
    lines, options = shown(command), own_options(command)
    sections = [line for line in lines if line in (*SECTIONS, "Options")]
    if len(options) <= FEW:
        assert sections == ["Options"]
    else:
        assert "Options" not in sections and len(sections) > 1
        assert sections == [section for section in SECTIONS if section in sections], "in one order everywhere"
        labels = {getattr(o, "rich_help_panel", None) or BASIC for o in options}
        assert labels <= set(SECTIONS)


@pytest.mark.parametrize("command", FORMS)
def test_every_option_is_there_with_a_short_type_and_a_whole_sentence(command: str) -> None:
    text = " ".join(" ".join(shown(command)).split())
    assert not re.search(r"<\w+>|\brange\b \[|BOOLEAN|INTEGER|VALUE\b", text)
    for option in COMMANDS[command].params if command else GROUP.params:
        if option.param_type_name == "option":
            assert f"{', '.join(sorted(option.opts, key=len))}" in text
        assert option.help and option.help[0].isupper() and option.help.endswith("."), option.name
        assert "when left out" not in option.help, f"{option.name}: say it in a whole sentence"


def test_booleans_show_no_type_and_numbers_a_letter() -> None:
    text = "\n".join(shown("quantize"))
    assert re.search(r"^  --overwrite   ", text, re.MULTILINE) and re.search(r"^  --samples N  ", text, re.MULTILINE)
    assert (
        "--card quick|full|none  " in text
        and re.search(r"^  --no-card   ", text, re.MULTILINE)
        and "--fit-memory SIZE" in text
    )


def test_required_options_and_arguments_are_in_the_usage() -> None:
    assert shown("export")[0] == "Usage: lowbit export FOLDER --as PROGRAM [OPTIONS]"
    assert shown("compare")[0] == "Usage: lowbit compare MODEL [RECIPE...] [OPTIONS]"
    assert shown("generate")[0] == "Usage: lowbit generate MODEL PROMPT... [OPTIONS]"


def test_commands_are_grouped_each_on_one_line() -> None:
    lines = shown("")
    headings = [line for line in lines if line in ("Make", "Measure", "Run", "Convert", "Look", "Other")]
    assert headings == ["Make", "Measure", "Run", "Convert", "Look"]
    for name in COMMANDS:
        (line,) = (line for line in lines if line.startswith(f"  {name} "))
        assert line.endswith(".") and cell_len(line) <= 80


def test_no_argument_shows_the_commands() -> None:
    result = CliRunner().invoke(app, [], env={"COLUMNS": "80"})
    assert result.exit_code == 2 and "Make a model small" in result.output


def test_help_imports_nothing_heavy_and_draws_styles_only_on_a_terminal() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from lowbit.cli.main import app\n"
        "out = CliRunner().invoke(app, ['--help']).stdout; assert '\\x1b' not in out and 'quantize' in out\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'lowbit.formats', 'lowbit.recipes', 'lowbit.solvers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
