"""Peak resident memory, of this process and of a fresh one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowbit.errors import LowbitError
from lowbit.interchange.files.undisturbed import temporary_folder

# Runs its arguments as a command and writes what the command used at most. It stands between the
# caller and the command because Linux counts the memory of the process that starts a program, even
# before the program begins, as the program's own peak; this one is small.
_LAUNCHER = """
import json, os, subprocess, sys, time
begin = time.perf_counter()
child = subprocess.Popen(sys.argv[2:])
if os.name == "posix":
    _, status, usage = os.wait4(child.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
else:
    code = child.wait()
    import ctypes
    from ctypes import wintypes
    counters = (ctypes.c_size_t * 9)()
    counters[0] = ctypes.sizeof(counters)
    handle = wintypes.HANDLE(int(child._handle))
    ctypes.windll.psapi.GetProcessMemoryInfo(handle, ctypes.byref(counters), ctypes.sizeof(counters))
    peak = counters[1]
with open(sys.argv[1], "w") as file:
    json.dump({"bytes": peak, "returncode": code, "seconds": time.perf_counter() - begin}, file)
"""


@dataclass(frozen=True)
class PeakMemory:
    """The most bytes that a process had resident at once, how long it took, and what it printed."""

    bytes: int
    seconds: float
    returncode: int
    stdout: str
    stderr: str


def resident() -> int:
    """Bytes that this process has resident now; where the system does not say, the most that it had."""
    return _status("VmRSS") or peak_resident()


def _status(what: str) -> int | None:
    """A size from Linux's status of this process."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(what))
    except (OSError, StopIteration):
        return None


def peak_resident() -> int:
    """The most bytes that this process has had resident since it began."""
    if (peak := _status("VmHWM")) is not None:
        return peak
    if sys.platform == "win32":
        return _windows_peak()
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _windows_peak() -> int:
    """PeakWorkingSetSize of PROCESS_MEMORY_COUNTERS: two DWORDs, then the peak and eight more sizes."""
    import ctypes
    from ctypes import wintypes

    counters = (ctypes.c_size_t * 9)()
    counters[0] = ctypes.sizeof(counters)
    windll = ctypes.windll  # type: ignore[attr-defined]
    handle = wintypes.HANDLE(windll.kernel32.GetCurrentProcess())
    windll.psapi.GetProcessMemoryInfo(handle, ctypes.byref(counters), ctypes.sizeof(counters))
    return int(counters[1])


def in_fresh_process(argv: Sequence[str], *, timeout: float | None = None) -> PeakMemory:
    """Run this Python with `argv` (such as ["-m", "module"] or ["-c", code]) and take its peak memory.

    The peak is the larger of the process's own and that of any one process that it waited for.
    Raises LowbitError with the last line of its output when it fails or takes longer than `timeout`
    seconds.
    """
    command = [sys.executable, *argv]
    with temporary_folder() as folder:
        report = folder / "usage.json"
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(report)]
        process = subprocess.Popen(
            launcher + command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException as error:
            _stop(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise LowbitError(f"{' '.join(argv)[:80]!r} took longer than {timeout} s") from None
            raise
        usage = json.loads(report.read_text()) if report.exists() else {"returncode": process.returncode}
    if usage["returncode"] != 0:
        last = (stderr.strip() or stdout.strip() or "no output").splitlines()[-1]
        raise LowbitError(
            f"the process measured for memory ended with {usage['returncode']}: {last}; "
            "a negative number is the signal that ended it, -9 often means out of memory"
        )
    return PeakMemory(usage["bytes"], usage["seconds"], usage["returncode"], stdout, stderr)


def _stop(process: subprocess.Popen[str]) -> None:
    """End the launcher and what it started."""
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)
    else:
        import os
        import signal

        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
