"""Threads that pack weights while the next ones are read."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import BoundedSemaphore
from typing import Any

from lowbit.errors import EngineError

_MOST = 4  # threads: memory is no faster for more


class PackingPool:
    """Packs in `threads` threads; as many weights again may wait, so that few are unpacked at once. A context manager.

    Reading stays with the thread that asks: the C library keeps what a thread of its own frees, and packed memory comes
    from the system.
    """

    def __init__(self, threads: int) -> None:
        count = min(threads, _MOST)
        self._pool, self._slots = ThreadPoolExecutor(count), BoundedSemaphore(2 * count)
        self._begun: list[Future[Any]] = []

    def __enter__(self) -> PackingPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, pack: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """What `pack(*arguments)` will have given."""
        self._slots.acquire()
        future = self._pool.submit(_said, pack, *arguments)
        future.add_done_callback(lambda _: self._slots.release())
        self._begun.append(future)
        return future

    @property
    def nbytes(self) -> int:
        """Bytes of everything that was packed."""
        return sum(future.result().nbytes for future in self._begun)


def _said(pack: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return pack(*arguments)
    except ValueError as error:
        raise EngineError(f"the engine cannot pack a weight: {error}") from None
