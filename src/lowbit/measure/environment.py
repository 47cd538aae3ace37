"""The machine and the versions that a measurement was made with."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch


@dataclass(frozen=True)
class Environment:
    """Versions ("" when not installed) and one line about the machine."""

    lowbit: str
    torch: str
    transformers: str
    python: str
    machine: str


def environment() -> Environment:
    """What this process runs on."""
    return Environment(
        lowbit=version_of("lowbit"),
        torch=str(torch.__version__),
        transformers=version_of("transformers"),
        python=platform.python_version(),
        machine=_machine(),
    )


def version_of(package: str) -> str:
    """ "" when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _machine() -> str:
    """Such as 'Linux x86_64, Intel Xeon, 4 cores, 2 threads used, 23 GiB, AVX512'."""
    parts = [
        f"{platform.system()} {platform.machine()}",
        _processor(),
        f"{os.cpu_count() or 1} cores, {torch.get_num_threads()} threads used",
        f"{memory_bytes() / 2**30:.0f} GiB" if memory_bytes() else "",
        torch.backends.cpu.get_cpu_capability(),
    ]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(part for part in parts if part)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Bytes of memory of this machine; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def free_memory() -> int:
    """Bytes of memory of this machine that programs can have now; all there is where the system does not say how much is free."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return memory_bytes()
