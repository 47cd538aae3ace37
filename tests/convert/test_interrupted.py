"""What an interruption leaves: nothing, the finished result, or what the message names. At every step, once and twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lowbit
from lowbit.convert import exporting, quantize_as
from lowbit.interchange.exporters.exporter import exporter_named
from lowbit.interchange.files import places, undisturbed
from lowbit.interchange.files.undisturbed import temporary_folder
from tiny import save_tiny

if sys.platform == "win32":
    pytest.skip("signals are POSIX's", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("interrupted")
    save_tiny("llama-tied", room / "float")
    lowbit.quantize(room / "float", "w4", room / "w4")
    return room


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def struck(patch: pytest.MonkeyPatch, where: Any, name: str, after: bool) -> None:
    """The function is interrupted as it begins or as it ends, every time that it is called."""
    own: Callable[..., Any] = getattr(where, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not after:
            stop()
        found = own(*args, **kwargs)
        if after:
            stop()
        return found

    patch.setattr(where, name, call)


STEPS = {
    "the folder to write in": (undisturbed.tempfile, "mkdtemp"),
    "writing": (type(exporter_named("gguf")), "write"),
    "reading back": (exporting, "compared"),
    "giving the name": (exporting, "_put"),
    "removing": (undisturbed.shutil, "rmtree"),
}


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_an_export_leaves_nothing_or_the_whole_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: bool, twice: bool
) -> None:
    with monkeypatch.context() as patch:
        struck(patch, *STEPS[step], after)
        if twice:
            struck(patch, *STEPS["removing"], after=False)
        with pytest.raises(KeyboardInterrupt):
            lowbit.export(folder / "w4", "gguf", tmp_path / "deep" / "x.gguf")
    left = [p.name for p in tmp_path.rglob("*")]
    assert left in ([], ["deep", "x.gguf"])
    assert (left != []) == (step == "removing" or (step == "giving the name" and after))
    lowbit.export(folder / "w4", "gguf", tmp_path / "deep" / "x.gguf")
    assert [p.name for p in tmp_path.rglob("*")] == ["deep", "x.gguf"]


@pytest.mark.parametrize(
    ("where", "name"),
    [(quantize_as, "quantize"), (quantize_as, "written"), (exporting, "compared"), (places.os, "rename"), (places, "sync")],
)  # fmt: skip
@pytest.mark.parametrize("after", [False, True])
def test_straight_to_another_format_leaves_what_it_names(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, after: bool
) -> None:
    out = tmp_path / "x.gguf"
    ready = quantize_as.prepare(folder / "float", "w4", "gguf")
    with monkeypatch.context() as patch:
        struck(patch, where, name, after)
        with pytest.raises(KeyboardInterrupt) as caught, quantize_as.quantized_as(folder / "float", ready, out):
            pass
    left = {p.name for p in tmp_path.iterdir()} - {"x.gguf"}
    said = " ".join(getattr(caught.value, "__notes__", ()))
    assert all(str(tmp_path / each) in said for each in left) and left <= {"x.gguf.lowbit", "x.gguf.lowbit.partial"}
    with quantize_as.quantized_as(folder / "float", ready, out):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGTERM, ["export", "w4", "--as", "vllm"]), (signal.SIGKILL, ["export", "w4", "--as", "vllm"]),
        (signal.SIGINT, ["dequantize", "w4"]), (signal.SIGTERM, ["quantize", "float", "w4", "--no-card"]),
    ],
)  # fmt: skip
def test_a_command_that_is_ended(folder: Path, tmp_path: Path, words: list[str], number: signal.Signals) -> None:
    """In a process of its own, while it syncs what it wrote. What SIGKILL leaves goes with the next run."""
    for name in ("w4", "float"):
        shutil.copytree(folder / name, tmp_path / name)
    script = (
        "import os, signal, sys\nfrom lowbit.interchange.files import atomic, folder_writer\nfrom lowbit.convert import exporting\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"def end(path): os.kill(os.getpid(), {int(number)})\n"
        "exporting.sync = end\nfolder_writer.sync = end\n"
        f"sys.argv = ['lowbit', *{[*words, '-o', 'out']!r}]\nfrom lowbit.cli import main\nmain.main()"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number], ended.stderr
    left = {p.name for p in tmp_path.iterdir()} - {"w4", "float"}
    if number != signal.SIGKILL:
        word = "terminated" if number == signal.SIGTERM else "interrupted"
        assert word in ended.stderr and all(str(tmp_path / name) in ended.stderr for name in left), (left, ended.stderr)
        assert words[0] != "export" or not left
    again = subprocess.run(
        [sys.executable, "-m", "lowbit", *words, "-o", "out"], capture_output=True, text=True, cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"w4", "float", "out"}


def test_a_temporary_folder_goes_however_often_one_interrupts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    struck(monkeypatch, undisturbed.shutil, "rmtree", after=False)
    with pytest.raises(KeyboardInterrupt), temporary_folder("x-", tmp_path) as made:
        (made / "file").write_text("half")
        stop()
    assert not list(tmp_path.iterdir())


def test_notes_on_what_a_temporary_folder_kept_go_with_it(tmp_path: Path) -> None:
    def broken() -> None:
        with temporary_folder("x-", tmp_path) as made:
            error = ValueError("broken")
            error.add_note(f"{made}/model.partial keeps what was done")
            error.add_note(f"{tmp_path}/rows keeps its rows")
            raise error

    with pytest.raises(ValueError, match="broken") as caught:
        broken()
    assert caught.value.__notes__ == [f"{tmp_path}/rows keeps its rows"]
