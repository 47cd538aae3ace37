"""A bar where somebody watches, a callback where one is given, and silence elsewhere."""

from __future__ import annotations

import io
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lowbit
from lowbit.interchange.progress import READ_BACK
from lowbit.report import watching
from tiny import save_tiny

TEXT = ["The cat sat on the mat and looked at the moon. " * 60]


class Terminal(io.StringIO):
    """A standard error that somebody watches."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("watched")
    save_tiny("llama", root / "m")
    lowbit.quantize(root / "m", "int4:g32", root / "q")
    return root


def watch(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """From here on standard error is a terminal. No fixture, as pytest puts its own in place before the test begins."""
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return found


CALLS: dict[str, Callable[[Path, Any], Any]] = {
    "quantize": lambda at, p: lowbit.quantize(at / "m", "w8", progress=p),
    "inspect": lambda at, p: lowbit.inspect(at / "m", progress=p),
    "evaluate": lambda at, p: lowbit.evaluate(at / "q", at / "m", TEXT, windows=1, length=64, progress=p),
    "compare": lambda at, p: lowbit.compare(at / "m", ["w8"], text=TEXT, windows=1, length=64, progress=p),
    "dequantize_model": lambda at, p: lowbit.dequantize_model(at / "q", at / "f", overwrite=True, progress=p),
    "export": lambda at, p: lowbit.export(at / "q", "gptq", at / "gptq", overwrite=True, progress=p),
}
WORDS = {
    "quantize": "quantizing", "inspect": "reading", "evaluate": "measuring quality", "compare": "the float model: perplexity",
    "dequantize_model": "writing", "export": "exporting",
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_who_watches_sees_a_bar_without_asking(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch)
    CALLS[name](folder, None)
    said = terminal.getvalue()
    assert WORDS[name] in said
    assert said.rstrip().endswith(("\x1b[2K", "\x1b[?25h")), "the lines are taken away when all is done"


@pytest.mark.parametrize("name", ["quantize", "compare"])
def test_who_asks_for_none_or_gives_a_function_sees_none(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal, heard = watch(monkeypatch), list[Any]()
    CALLS[name](folder, lambda *report: heard.append(report))
    assert heard and heard[-1][-2] == heard[-1][-1], "the last report says that all is done"
    CALLS[name](folder, False)
    assert WORDS[name] not in terminal.getvalue()


def test_a_pipe_gets_lines_for_who_asks_and_nothing_for_others(folder: Path) -> None:
    code = (
        "import sys, lowbit\n"
        "lowbit.quantize(sys.argv[1], 'w8', progress={})\n"
    )  # fmt: skip
    for wish, said in (("None", False), ("False", False), ("True", True)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(wish), str(folder / "m")], capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout == ""
        assert ("quantizing" in done.stderr) is said, done.stderr


def test_an_error_takes_the_bar_away_and_is_raised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch)
    with pytest.raises(lowbit.LowbitError):
        lowbit.evaluate(folder / "q", text=["short"], length=64)
    assert "\x1b[?25l" in terminal.getvalue() and terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count(
        "\x1b[?25h"
    )


def test_calls_inside_a_call_draw_nothing_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch(monkeypatch)
    drawn = []
    picture = watching.picture
    monkeypatch.setattr(watching, "picture", lambda *what: drawn.append(what) or picture(*what))  # type: ignore[func-returns-value]
    lowbit.compare(folder / "m", ["w8", "w4"], text=TEXT, windows=1, length=64)
    assert drawn == [("comparing", "")]


def test_a_notebook_has_one_line_that_goes_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            shown.append(data["text/plain"])

    module, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    module.get_ipython = lambda: types.SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    display.display = lambda data, raw, display_id: Handle()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    assert watching.in_notebook() and watching.is_watched()
    monkeypatch.setattr(watching, "_EVERY", 0.0)
    lowbit.quantize(folder / "m", "w8")
    assert shown[-1] == "" and any(line.startswith("quantizing: ") and " of " in line for line in shown)


def test_every_long_call_is_watched_and_takes_a_wish() -> None:
    import inspect

    for name in lowbit.__all__:
        function = getattr(lowbit, name)
        takes = name[0].islower() and "progress" in inspect.signature(function).parameters
        assert takes == (name in lowbit._WATCHED), name
        if takes:
            assert "progress=False" in (function.__doc__ or "")
            assert "bool" in str(inspect.signature(function).parameters["progress"].annotation), name


@pytest.mark.parametrize("target", ["gptq", "gguf"])
def test_reading_an_export_back_is_a_stage_that_counts_from_nothing(target: str, folder: Path, tmp_path: Path) -> None:
    """What takes most of an export is seen to move: writing and reading back each go from 0 to all, and never stand at the end."""
    model = folder / "q"
    if target == "gguf":
        model = tmp_path / "q8"
        lowbit.quantize(folder / "m", "q8_0", model)
    seen = list[tuple[str, int, int]]()
    lowbit.export(model, target, tmp_path / "out.gguf", progress=lambda *each: seen.append(each))
    back = [name.startswith(READ_BACK) for name, _, _ in seen]
    first = back.index(True)
    assert all(back[first:]), "the second stage comes after the first"
    for stage in (seen[:first], seen[first:]):
        counts = [at for _, at, _ in stage]
        assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == stage[-1][2]
    assert counts.count(counts[-1]) == 1, "the last count is the end of the work"
