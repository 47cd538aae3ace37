"""A source distribution installs where there is no compiler, without the C++ part, which it says; or not, where that is asked."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("scikit_build_core") is None, reason="needs scikit-build-core"),
    pytest.mark.skipif(find_spec("nanobind") is None, reason="needs nanobind"),
    pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the sources"),
]
NO_COMPILER = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (found,) = folder.glob("*.tar.gz")
    return found


def wheel(sdist: Path, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir", "-w",
        str(out), str(sdist),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | NO_COMPILER | env)


def test_it_holds_the_sources_and_nothing_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"csrc/CMakeLists.txt", "csrc/bindings/module.cpp", "src/lowbit/__init__.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyd", ".o"))]


def test_it_installs_without_a_compiler_and_says_so(sdist: Path, tmp_path: Path) -> None:
    done = wheel(sdist, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = tmp_path.glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(built) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {"lowbit/engine/engine.py", "lowbit/py.typed"} <= set(names)
    assert not [n for n in names if n.endswith((".so", ".pyd", ".cpp"))]
    code = "import lowbit; from lowbit.kernels.core import why_absent; print(lowbit.__file__); print(why_absent())"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    ).stdout  # fmt: skip
    assert str(tmp_path) in said and "built without: no C++ compiler" in said and "pip install" in said


def test_it_does_not_where_the_core_is_required(sdist: Path, tmp_path: Path) -> None:
    done = wheel(sdist, tmp_path, LOWBIT_REQUIRE_CORE="1")
    assert done.returncode != 0 and not list(tmp_path.glob("*.whl"))
