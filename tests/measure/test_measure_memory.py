from __future__ import annotations

import sys

import pytest

from lowbit.errors import LowbitError
from lowbit.measure.memory import in_fresh_process, peak_resident

MIB = 2**20
TOUCH = "x = bytearray({0} * 2**20); x[::4096] = b'1' * len(x[::4096]); print('touched')"


def test_peak_of_this_process_grows_and_stays():
    before = peak_resident()
    block = bytearray(b"1") * (before + 64 * MIB)
    grown = peak_resident()
    assert grown >= len(block)
    del block
    assert peak_resident() >= 0.99 * grown  # the kernel keeps it to within a few pages a core


def test_a_fresh_process_is_not_charged_for_its_starter():
    held = bytearray(b"1") * (300 * MIB)
    small = in_fresh_process(["-c", "pass"])
    assert small.bytes < 100 * MIB < len(held)


def test_what_a_process_touches_is_seen():
    small, large = (in_fresh_process(["-c", TOUCH.format(size)]) for size in (1, 200))
    assert 190 * MIB < large.bytes - small.bytes < 215 * MIB
    assert large.stdout == "touched\n" and large.returncode == 0 and large.seconds > 0


def test_children_that_it_waits_for_count():
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TOUCH.format(150)!r}], check=True)"
    assert in_fresh_process(["-c", code]).bytes > 150 * MIB


def test_failure_is_one_line():
    with pytest.raises(LowbitError, match="ended with 3: gone wrong"):
        in_fresh_process(["-c", "import sys; print('gone wrong', file=sys.stderr); sys.exit(3)"])


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_process_is_an_error():
    with pytest.raises(LowbitError, match="-9"):
        in_fresh_process(["-c", "import os; os.kill(os.getpid(), 9)"])


def test_time_limit():
    with pytest.raises(LowbitError, match="longer than"):
        in_fresh_process(["-c", "import time; time.sleep(60)"], timeout=1.0)
