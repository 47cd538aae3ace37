"""A bar for calls from Python that take long: on a terminal and in a notebook without asking, elsewhere for `progress=True`."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from inspect import signature
from typing import Any, TypeVar

from lowbit.display import visible
from lowbit.interchange.pace import Tracker
from lowbit.report.progress_view import Shown, drawn, line_text

F = TypeVar("F", bound=Callable[..., Any])

_HEARS = ("progress", "told", "on_step", "on_row")  # parameters by which a call tells how far it is
_EVERY = 0.25  # seconds between two pictures in a notebook
_DOCUMENTED = """

    A bar shows how far it is, on a terminal (on stderr) and in a notebook: `progress=False` for none, `progress=True` for one anywhere (lines
    now and then where there is no terminal), or a function to be called instead.
    """


@functools.cache
def watched(function: F, what: str, unit: str) -> F:
    """`function` with a bar, where its caller watches and gives no callback of its own.

    what: what is done, in words; empty where the function says so itself. unit: of what is counted, "bytes" or such as "windows".
    """
    asked = signature(function).parameters

    @functools.wraps(function)
    def called(*args: Any, **given: Any) -> Any:
        wish = given.pop("progress", None)
        if callable(wish):
            return function(*args, progress=wish, **given)
        listens = any(given.get(name) is not None for name in _HEARS)
        if wish is False or (wish is None and (listens or not is_watched())):
            return function(*args, **given)
        with picture(what, unit) as shown:
            return function(*args, **{**_told_to(shown, asked), **given})

    called.__doc__ = (function.__doc__ or "").rstrip() + _DOCUMENTED
    result: Any = called
    return result


def _told_to(shown: Shown, asked: Any) -> dict[str, Callable[..., Any]]:
    """Callbacks for those parameters of a function by which it tells how far it is."""
    found: dict[str, Callable[..., Any]] = {}
    if "on_row" in asked:
        from lowbit.report.tables import row_line

        found["on_row"] = lambda row: shown.keep(row_line(row))
    if "on_step" in asked:
        return found | {"on_step": shown.show}
    if "told" in asked:
        found["told"] = shown.say

    def progress(*report: Any) -> None:  # (done, in all), or with the name of what is at hand before them
        *note, done, total = report
        shown.move(done, total, visible("".join(note)))

    return found | {"progress": progress}


def is_watched() -> bool:
    """Whether somebody sees a bar: stderr is a terminal, or this is a notebook."""
    return in_notebook() or (sys.stderr is not None and sys.stderr.isatty())


def in_notebook() -> bool:
    """Whether results are shown by a notebook. IPython is not imported where it is not there already."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None and hasattr(module, "get_ipython") else None
    return shell is not None and hasattr(shell, "kernel")


def picture(what: str, unit: str) -> AbstractContextManager[Shown]:
    """A tracker that is drawn as long as the block runs, and what moves it."""
    tracker = Tracker(what, unit)
    if in_notebook():
        return _cell(tracker)
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False, force_jupyter=False)
    return drawn(tracker, console, lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201


class _Cell(Shown):
    """Below a cell of a notebook: one line, redrawn at each report but not more often than the eye needs."""

    def __init__(self, tracker: Tracker, show: Callable[[str], Any], keep: Callable[[str], Any]) -> None:
        super().__init__(tracker, None, keep)
        self._show, self._last = show, float("-inf")

    def say(self, what: str) -> None:
        super().say(what)
        self._draw(True)

    def move(self, done: int, total: int, note: str = "", more: bool | None = None) -> None:
        super().move(done, total, note, more)
        self._draw()

    def show(self, step: Any) -> None:
        super().show(step)
        self._draw()

    def _draw(self, now: bool = False) -> None:
        if now or time.monotonic() - self._last >= _EVERY:
            self._last = time.monotonic()
            self._show(line_text(self._tracker.now(), self._tracker.elapsed))


@contextmanager
def _cell(tracker: Tracker) -> Iterator[Shown]:
    """A tracker in a notebook, by IPython alone; the line goes away when the call is done."""
    from IPython.display import display  # type: ignore[import-not-found,unused-ignore]

    handle = display({"text/plain": ""}, raw=True, display_id=True)

    def show(line: str) -> None:
        handle.update({"text/plain": line}, raw=True)

    try:
        yield _Cell(tracker, show, lambda line: print(line))  # noqa: T201
    finally:
        show("")
