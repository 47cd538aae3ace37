"""The program that the sanitizers watch, run without them: what it expects is right, and it is quick to run again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.kernels.core import core

DRIVER = Path(__file__).parent / "drive_core.py"
module = core()


@pytest.mark.skipif(module is None, reason="lowbit._core is not built")
@pytest.mark.parametrize(
    "part",
    [
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
    ],
)
def test_everything_that_the_core_has(part: str) -> None:
    done = subprocess.run([sys.executable, str(DRIVER), str(module.__file__), part], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
