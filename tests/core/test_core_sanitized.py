"""The C++ part under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sanitizers are preloaded, which is for Linux"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake"),
    pytest.mark.skipif(find_spec("nanobind") is None, reason="needs nanobind"),
]
DRIVER = Path(__file__).parent / "drive_core.py"
PARTS = (
    "kernels",
    "spread",
    "joined",
    "decoder",
    "interrupted",
    "sampler",
    "limits",
    "fits",
    "solvers",
    "moments",
    "causal",
)


def runtime(name: str) -> str:
    """The sanitizer's library, which has to be there before Python is."""
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"the compiler has no {name}")
    return path


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    configure = [
        "cmake", "-S", str(ROOT / "csrc"), "-B", str(folder), "-DLOWBIT_SANITIZE=ON", f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(folder), "-j", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (found,) = folder.glob("_core*.so")
    return found


def run(*command: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        # Python itself leaks at exit by design.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env)


def test_the_sanitizer_is_live(module: Path) -> None:
    """Without this the other tests could pass because nothing watches."""
    linked = subprocess.run(["ldd", str(module)], capture_output=True, text=True).stdout
    assert "libasan" in linked and "libubsan" in linked
    overflow = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
ctypes.memset(libc.malloc(16), 0, 17)
"""
    done = run("-c", overflow)
    assert done.returncode == 99 and "heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_read_or_written_that_is_not_there(part: str, module: Path) -> None:
    done = run(DRIVER, module, part)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "runtime error" not in done.stderr, done.stderr[-6000:]
