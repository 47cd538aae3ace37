"""Freed memory goes back to the system: glibc keeps it otherwise, and a process then looks, and is, larger than it works."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def trim() -> None:
    """Return free pages of the heap to the system, where the C library can (`malloc_trim` of glibc); takes milliseconds."""
    found = _malloc_trim()
    if found is not None:
        found(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (OSError, AttributeError, TypeError):
        return None
