"""Without the C++ part everything works, and it is said why and what to do, once."""

from __future__ import annotations

import ast
import importlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

import lowbit
from lowbit.kernels import core as door
from lowbit.report import doctor
from lowbit.report.doctor_view import render_report


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    door._loaded.cache_clear()
    door._say.cache_clear()
    yield
    door._loaded.cache_clear()
    door._say.cache_clear()


def give(patch: pytest.MonkeyPatch, answer: object) -> None:
    """Let the import of the module end with `answer`, raised if it is an exception."""

    def imported(name: str, package: str | None = None) -> object:
        if name == "lowbit._core":
            if isinstance(answer, BaseException):
                raise answer
            return answer
        return real(name, package)

    real = importlib.import_module
    patch.setattr(door.importlib, "import_module", imported)


NOT_THERE = ModuleNotFoundError("No module named 'lowbit._core'", name="lowbit._core")


def shown() -> str:
    console = Console(width=300)
    with console.capture() as capture:
        console.print(render_report(doctor.examine(kernels=False)))
    return capture.get()


def test_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(door, "_HOME", tmp_path)
    give(monkeypatch, NOT_THERE)
    assert door.why_absent().startswith("built without: no C++ compiler") and not caplog.records
    with caplog.at_level(logging.WARNING, "lowbit"):
        assert door.core() is None and door.core() is None
    (said,) = caplog.messages
    assert "slower" in said and "pip install" in said
    assert "built without: no C++ compiler" in shown() and "avx2: " not in shown()
    assert "does not run here, transformers does: built without: no C++ compiler" in shown()
    assert doctor.examine(kernels=False).engine == doctor.EngineState(False, reason=door.why_absent())


def test_built_for_another_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_core.pyi").touch()
    other = tmp_path / f"_core.cpython-399-nowhere{EXTENSION_SUFFIXES[-1]}"
    other.touch()
    monkeypatch.setattr(door, "_HOME", tmp_path)
    give(monkeypatch, NOT_THERE)
    assert f"{other} was built for another Python" in door.why_absent()


def test_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, ImportError("undefined symbol: x"))
    assert "does not load (undefined symbol: x)" in door.why_absent() and door.core() is None


def test_left_over_from_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, SimpleNamespace(version="0.0.1"))
    assert "built from 0.0.1" in door.why_absent() and door.core() is None


def test_a_module_missing_inside_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, ModuleNotFoundError("No module named 'y'", name="y"))
    with pytest.raises(ModuleNotFoundError, match="'y'"):
        door.why_absent()


def test_doctor_says_which_set_is_live_and_what_others_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("lowbit._core")
    module.version = lowbit.__version__
    module.isas = lambda: ["avx2", "portable"]
    missing = {"avx512": ["avx512f", "avx512bw"], "avx2": [], "portable": []}
    module.features = lambda: {"missing": missing, "cores": 3}
    give(monkeypatch, module)
    assert doctor.examine(kernels=False).core == {
        "avx512": "not on this processor, which lacks avx512f, avx512bw",
        "avx2": "live",
        "portable": "supported",
    }
    assert "avx2: live" in shown() and "lacks avx512f, avx512bw" in shown()
    assert "runs here: avx2, 3 threads" in shown()
    module.isas = lambda: ["portable"]
    assert doctor.examine(kernels=False).engine == doctor.EngineState(True, "portable", 3)
    assert "portable, 3 threads; slow" in shown()


def test_only_one_file_imports_it_and_never_with_lowbit() -> None:
    source = Path(lowbit.__file__).parent
    naming = [
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if (isinstance(node, ast.ImportFrom) and any(alias.name == "_core" for alias in node.names))
        or (isinstance(node, ast.Constant) and node.value == "lowbit._core")
    ]
    assert naming == ["kernels/core.py"]
    code = "import lowbit, sys; sys.exit('lowbit._core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
