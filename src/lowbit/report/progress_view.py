"""How far a long call is, for people: two moving lines on a terminal, and a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lowbit.interchange.pace import Clock, Tracker
from lowbit.interchange.progress import Step
from lowbit.report.wording import bytes_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_BAR, _SHORT_BAR = 24, 8  # characters; beside the figures of one step of several there is less room
EVERY = 10.0  # seconds between plain lines


def duration_text(seconds: float) -> str:
    """'8 s', '3 min', '1 h 20 min': as exact as an estimate is."""
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def elapsed_text(seconds: float) -> str:
    """'8 s', '1 min 10 s', '1 h 20 min': exact enough that two lines ten seconds apart differ in the first hour."""
    whole = round(seconds)
    if 60 <= whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return duration_text(seconds)


def left_text(step: Step) -> str:
    """'about 3 min left', 'at least 3 min left', or empty where nothing is known yet."""
    if not step.seconds_left:
        return ""
    return f"{'at least' if step.at_least else 'about'} {duration_text(step.seconds_left)} left"


def done_text(step: Step) -> str:
    """'3/8 windows', '45 of 130 MiB', or empty where nothing is counted."""
    if not step.total:
        return ""
    if step.unit == "%":
        return f"{100 * step.done / step.total:.0f} %"
    if step.unit != "bytes":
        return f"{step.done}/{step.total} {step.unit}".rstrip()
    done, total = bytes_text(step.done), bytes_text(step.total)
    return f"{done.removesuffix(total[total.rindex(' ') :])} of {total}"


def line_text(step: Step, elapsed: float) -> str:
    """One plain line: what is at work, how much of it is done, how long it went and will go on."""
    note = f"; {step.note}" if step.note else ""
    return f"{step.what}: {_figures(step, elapsed)}{note}"


def _figures(step: Step, elapsed: float) -> str:
    """'45 %, 30 s so far, about 1 min left'; of one of several steps 'step 45 %; all: 30 s so far, about 1 min left'."""
    done = done_text(step)
    times = ", ".join(text for text in (f"{elapsed_text(elapsed)} so far", left_text(step)) if text)
    if not done:
        return times
    return f"step {done}; all: {times}" if step.one_of > 1 else f"{done}, {times}"


def moving_lines(step: Step, elapsed: float) -> RenderableType:
    """What is at work, and below it a bar with the figures."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    bar = Table.grid(padding=(0, 1))
    bar.add_column(width=_BAR if step.one_of == 1 else _SHORT_BAR)
    bar.add_column(no_wrap=True)
    bar.add_row(
        ProgressBar(total=step.total or None, completed=step.done, pulse=not step.total),
        Text(_figures(step, elapsed), "dim"),
    )
    return Group(
        Text(step.what, overflow="fold"), *([Text(step.note, "dim", overflow="fold")] if step.note else []), bar
    )


class Lines:
    """Plain lines about a tracker: one when something new begins, then one every `EVERY` seconds, through `write`."""

    def __init__(self, tracker: Tracker, write: Callable[[str], Any], clock: Clock = time.monotonic) -> None:
        self._tracker, self._write, self._clock = tracker, write, clock
        self._last: float | None = None

    @property
    def begun(self) -> bool:
        """Whether anything was said."""
        return self._last is not None

    def begin(self) -> None:
        """Say what begins, at once: a log or a pipe shows where a long command is."""
        step = self._tracker.now()
        self._write(f"{step.what}; {step.note}" if step.note else step.what)
        self._last = self._clock()

    def tick(self) -> None:
        """Say how far it is, if the last line is long enough ago; also what has not told of itself yet, such as models that are loaded."""
        if self._last is None:
            if self._tracker.elapsed >= EVERY and self._tracker.now().what:
                self.begin()
        elif self._clock() - self._last >= EVERY:
            self._write(line_text(self._tracker.now(), self._tracker.elapsed))
            self._last = self._clock()


class Shown:
    """What a drawing takes: reports about a tracker, and lines that stay.

    `move(done, total)` and `show(step)` move it, `say(what)` names what begins, `keep(line)` writes a line that stays, above a bar.
    """

    def __init__(self, tracker: Tracker, lines: Lines | None, keep: Callable[[str], Any]) -> None:
        self._tracker, self._lines, self.keep = tracker, lines, keep

    def say(self, what: str) -> None:
        self._tracker.say(what)
        if self._lines is not None:
            self._lines.begin()

    def move(self, done: int, total: int, note: str = "", more: bool | None = None) -> None:
        self._tracker.move(done, total, note, more)
        self._first()

    def show(self, step: Step) -> None:
        self._tracker.show(step)
        self._first()

    def _first(self) -> None:
        # Not before something is reported: an error of what was asked for stands alone.
        if self._lines is not None and not self._lines.begun:
            self._lines.begin()


@contextmanager
def drawn(tracker: Tracker, console: Console, write: Callable[[str], Any]) -> Iterator[Shown]:
    """A tracker drawn as long as the block runs: on a terminal by `console`, which is clean again afterwards, and else line by line
    by `write`."""
    if not console.is_terminal:
        lines, over = Lines(tracker, write), threading.Event()

        def watch() -> None:
            with contextlib.suppress(OSError, ValueError):  # nobody reads them any more
                while not over.wait(1.0):
                    lines.tick()

        watcher = threading.Thread(target=watch, name="lowbit-progress", daemon=True)
        watcher.start()
        try:
            yield Shown(tracker, lines, write)
        finally:
            over.set()
            watcher.join()
        return
    from rich.live import Live
    from rich.text import Text

    def picture() -> RenderableType:
        step = tracker.now()
        return moving_lines(step, tracker.elapsed) if step.what else Text("")

    with Live(console=console, transient=True, get_renderable=picture, redirect_stdout=False) as live:
        yield Shown(tracker, None, lambda line: live.console.print(line, markup=False, highlight=False))
