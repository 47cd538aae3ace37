"""Reading and writing beside the work, so that neither waits for the other: a thread that reads ahead, and one that writes behind.

Both hold a bounded number of bytes, which `planning/plan.py` counts, and both keep the order of things: what is written, and what
a killed run leaves, is the same as without them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

T = TypeVar("T")


def read_ahead(items: Sequence[tuple[T, int]], read: Callable[[T], Any], room: int) -> Iterator[tuple[T, Any]]:
    """(item, what `read` gives for it), in order; later ones are read in a thread while the caller uses this one.

    `items` with the bytes that each takes; those that are read or in use take `room` together, or one alone takes more.
    """

    def quietly(item: T) -> Any:
        with torch.no_grad():
            return read(item)

    waiting, reading = deque(items), deque[tuple[T, int, Future[Any]]]()
    held = 0
    with ThreadPoolExecutor(1, "lowbit-read") as thread:
        try:
            while waiting or reading:
                while waiting and (not held or held + waiting[0][1] <= room):
                    item, size = waiting.popleft()
                    reading.append((item, size, thread.submit(quietly, item)))
                    held += size
                item, size, future = reading.popleft()
                found = future.result()
                del future
                yield item, found
                del found
                held -= size
        finally:
            for *_, future in reading:
                future.cancel()


class Behind:
    """Calls functions in a thread, in order, in a `with`, and what is to follow in the caller's own thread.

    The first error of one is raised where the caller waits for it. After an error of the caller, what was asked for before is
    still done.
    """

    def __init__(self, room: int) -> None:
        """`room`: bytes that what waits may hold. A call that holds more is waited for."""
        self._room, self._held, self._done = room, 0, 0
        self._waiting = deque[tuple[int, Future[Any], Callable[[Any], None]]]()
        self._failed = False
        self._thread = ThreadPoolExecutor(1, "lowbit-write")

    def call(self, size: int, function: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Have `function` called, which holds `size` bytes, and later `then` with what it gave."""
        while self._waiting and self._held + size > self._room:
            self._finish_one()
        self._waiting.append((size, self._thread.submit(self._run, function), then))
        self._held += size
        if size > self._room:
            self._finish_one()

    def has_done(self, count: int, wait: bool = False) -> bool:
        """Whether so many calls are done; `wait` until they are."""
        while self._done < count and self._waiting and (wait or self._waiting[0][1].done()):
            self._finish_one()
        return self._done >= count

    def _run(self, function: Callable[[], Any]) -> Any:
        if self._failed:
            return None
        try:
            return function()
        except BaseException:
            self._failed = True
            raise

    def _finish_one(self) -> None:
        size, future, then = self._waiting[0]
        found = future.result()
        self._waiting.popleft()
        self._held -= size
        then(found)
        self._done += 1

    def _settle(self) -> None:
        while self._waiting:
            self._finish_one()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._settle()
        finally:
            self._thread.shutdown(wait=True)
            if error is not None:
                with suppress(Exception):
                    self._settle()
