"""The threads that multiply packed weights, shared by all weights of a process.

PyTorch's OpenMP threads spin for milliseconds after every parallel loop. A second pool beside them would wait for
processors that do nothing, so the threads of that runtime are borrowed, through the names that its ABI fixes. Where
there is none, or it has other names (macOS, Windows), the core has threads of its own.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lowbit.kernels.core import core

_NAMES = ("GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num")
_lock = threading.Lock()
_multipliers: dict[tuple[int, str], Any] = {}
_pools: dict[int, Any] = {}
_lost: list[Any] = []  # of a process that forked; their threads are not here, and freeing them would wait for these


def multiplier(isa: str = "") -> Any:
    """The `Multiplier` of `lowbit._core` for as many threads as PyTorch uses now; `isa` "": the best set of kernels."""
    key = torch.get_num_threads(), isa
    found = _multipliers.get(key)
    return found if found is not None else _make(key)


def pool() -> Any:
    """The `ThreadPool` of `lowbit._core` for as many threads as PyTorch uses now."""
    threads = torch.get_num_threads()
    found = _pools.get(threads)
    if found is None:
        with _lock:
            found = _pool(threads)
    return found


def _pool(threads: int) -> Any:
    if threads not in _pools:
        if not _pools:
            _forget_in_time()
        for old in [t for t in _pools if t != threads]:
            del _pools[old]  # who uses it keeps it alive
        module: Any = core()
        _pools[threads] = module.ThreadPool(threads, openmp())
    return _pools[threads]


def _make(key: tuple[int, str]) -> Any:
    threads, isa = key
    with _lock:
        if key not in _multipliers:
            for old in [k for k in _multipliers if k[0] != threads]:
                del _multipliers[old]  # who is in a product keeps it alive
            module: Any = core()
            _multipliers[key] = module.Multiplier(_pool(threads), isa)
        return _multipliers[key]


@cache
def openmp() -> tuple[int, int, int] | None:
    """Addresses of the functions that start PyTorch's OpenMP threads and tell them apart, or None."""
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # loaded long ago
        addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in _NAMES]
    except (OSError, AttributeError):
        return None
    return (addresses[0], addresses[1], addresses[2]) if all(addresses) else None


@cache
def _forget_in_time() -> None:
    atexit.register(_clear)  # before the interpreter goes, which nanobind would call a leak
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget)


def _clear() -> None:
    _multipliers.clear()
    _pools.clear()


def _forget() -> None:
    global _lock
    _lock = threading.Lock()
    _lost.extend([*_multipliers.values(), *_pools.values()])
    _clear()
