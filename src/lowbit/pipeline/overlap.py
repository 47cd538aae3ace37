"""Reading and writing beside the work, so that neither waits for the other: a thread that reads ahead, and one that writes behind.

Both hold a bounded number of bytes, which `planning/plan.py` counts, and both keep the order of things: what is written, and what
a killed run leaves, is the same as without them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
    """Calls functions in a thread, in order, in a `with`; the first error of one is raised by the next call, or at the end.

    After an error of the caller, what was asked for before is still done.
    """

    def __init__(self, room: int) -> None:
        """`room`: bytes that what waits may hold. A call that holds more is waited for."""
        self._room, self._held = room, 0
        self._waiting = deque[tuple[int, Future[Any]]]()
        self._failed = False
        self._thread = ThreadPoolExecutor(1, "lowbit-write")

    def call(self, size: int, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Have `function` called, its arguments holding `size` bytes."""
        while self._waiting and self._held + size > self._room:
            self._wait()
        self._waiting.append((size, self._thread.submit(self._run, function, arguments, named)))
        self._held += size
        if size > self._room:
            self._wait()

    def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._failed:
            return
        try:
            function(*arguments, **named)
        except BaseException:
            self._failed = True
            raise

    def _wait(self) -> None:
        size, future = self._waiting.popleft()
        self._held -= size
        future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while error is None and self._waiting:
                self._wait()
        finally:
            self._thread.shutdown(wait=True)
