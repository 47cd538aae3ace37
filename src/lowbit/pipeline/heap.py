"""The heap of the C library: freed memory serves the next tensors, and goes back to the system where a phase ends.

glibc gives the end of its heap back at every chance, and the kernel then clears the pages of each activation anew; all of
it kept, a process would look, and be, larger than it works.
"""

from __future__ import annotations

import ctypes
import functools

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_* of glibc's malloc.h
_LARGE = 32 << 20  # bytes; the most that glibc takes as a threshold, which it also raises to by itself


def keep_freed() -> None:
    """From now on tensors of up to 32 MiB come from the heap, which keeps up to 64 MiB free at its end until `trim`."""
    library = _glibc()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGE)


def trim() -> None:
    """Return free pages of the heap to the system, where the C library can (`malloc_trim` of glibc); takes milliseconds."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        return library if library.malloc_trim and library.mallopt else None
    except (OSError, AttributeError, TypeError):
        return None
