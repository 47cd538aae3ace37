"""How long work will still take, told from what is done: of one count (`Pace`), of a call (`Tracker`), of a list of stages (`Stages`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lowbit.interchange.progress import OnStep, Step

Clock = Callable[[], float]
_RECENT = 60.0  # seconds: older reports say less of how fast the work is now
_SURE = 0.5  # seconds: over less, a clock and a first step say nothing


class Pace:
    """Seconds left of work that counts up evenly, from the reports of about the last minute.

    A report that brings nothing new says that work begins: what was counted before it was of another kind and is forgotten, such as
    an embedding that takes no time before blocks that take minutes. So is what a run that goes on had done already.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._reports = [(clock(), 0)]
        self._said = self._begun = (
            False  # whether a report said that work begins; whether another brought something since
        )

    def report(self, done: int) -> None:
        """So much is done now."""
        now, before = self._clock(), self._reports[-1][1]
        if done < before or (done == before and not self._begun):
            self._reports, self._said, self._begun = [(now, done)], True, False
            return
        self._begun = self._begun or (self._said and done > before)
        self._reports.append((now, done))
        while len(self._reports) > 2 and self._reports[1][0] < now - _RECENT:
            del self._reports[0]

    def left(self, total: int) -> float | None:
        """Seconds until `total` is done; None before anything is."""
        (start, before), (latest, done) = self._reports[0], self._reports[-1]
        span, gained, silence = latest - start, done - before, self._clock() - latest
        if total <= done:
            return 0.0
        if gained <= 0 or span + silence < _SURE:
            return None
        if silence <= span:
            return max(0.0, (total - done) * span / gained - silence)
        return (total - done) * (span + silence) / gained  # the work became slower than it was


class Tracker:
    """Where a call is, for whoever draws it: it hears the call's reports, and `now()` gives a Step at any time."""

    def __init__(self, what: str, unit: str = "", clock: Clock = time.monotonic) -> None:
        self._clock, self._step = clock, Step(what, unit=unit)
        self._pace: Pace | None = Pace(clock)
        self._shown = self._began = clock()
        self.begun = False  # whether anything was reported

    def say(self, what: str) -> None:
        """Something begins, of which nothing is counted yet."""
        step = Step(what, unit=self._step.unit, at_least=True)  # what comes after it is not known here
        self._step, self._pace, self.begun = step, Pace(self._clock), True

    def move(self, done: int, total: int, note: str = "", more: bool | None = None) -> None:
        """So much is done. more: whether other work comes after this, so that the time left is a lower bound; None: as before."""
        if self._pace is None:
            self._pace = Pace(self._clock)
        self._pace.report(done)
        at_least = self._step.at_least if more is None else more
        self._step = replace(self._step, done=done, total=total, note=note, at_least=at_least)
        self.begun = True

    def show(self, step: Step) -> None:
        """A step from a call that knows its own time left."""
        self._step, self._pace, self._shown, self.begun = step, None, self._clock(), True

    @property
    def elapsed(self) -> float:
        """Seconds since the call began."""
        return self._clock() - self._began

    def now(self) -> Step:
        """The latest step, with the time left as of now."""
        step = self._step
        if self._pace is not None:
            return replace(step, seconds_left=None if not step.total else self._pace.left(step.total))
        if step.seconds_left is None:
            return step
        left = step.seconds_left - (self._clock() - self._shown)
        return replace(
            step, seconds_left=left if left > 0 or step.seconds_left == 0 else None
        )  # it takes longer than was thought


@dataclass(frozen=True)
class Stage:
    """A part of work whose parts are known before it begins.

    what   in words, for who watches
    kinds  names of what it is like, the most alike first: stages of one kind take about as long for each of `count`
    count  how much of it there is, of `unit`
    """

    what: str
    kinds: tuple[str, ...]
    count: int = 1
    unit: str = ""


class Stages:
    """Stages one after the other, each told to `show`, with the time left of all of them.

    A stage that nothing is known of counts by how long stages of its kind took; where none of its kind is done, the time left is a
    lower bound.
    """

    def __init__(self, stages: Sequence[Stage], show: OnStep, clock: Clock = time.monotonic) -> None:
        self._ahead, self._show, self._clock = list(stages), show, clock
        self._count = len(stages)
        self._costs: dict[str, list[float]] = {}  # kind -> seconds for one of its count
        self._now: Stage | None = None
        self._start = self._pass = clock()  # of the stage at hand, and of a pass of it that counts again from nothing
        self._done = self._total = 0

    def begin(self, stage: Stage) -> None:
        """The next of the stages begins, and those before it that did not are left out."""
        self._finish()
        while self._ahead and self._ahead.pop(0) != stage:
            pass
        self._now, self._done = stage, 0
        self._start = self._pass = self._clock()
        self._total = 0 if stage.unit == "%" else stage.count  # its own reports say of how much
        self._tell()

    def move(self, done: int, total: int) -> None:
        """So much of the stage at hand is done."""
        if done < self._done:
            self._pass = self._clock()
        self._done, self._total = done, total
        self._tell()

    def drop(self) -> None:
        """The stage at hand ended without being done: nothing is learned of its cost."""
        self._now = None

    def end(self) -> None:
        """All is done."""
        self._finish()
        self._now, self._ahead = None, []

    def left(self) -> tuple[float, bool]:
        """(seconds, whether they are a lower bound)."""
        seconds, bound = 0.0, False
        for part in (self._left_of_this(), *(self._guess(stage) for stage in self._ahead)):
            bound, seconds = bound or part is None, seconds + (part or 0.0)
        return seconds, bound

    def _finish(self) -> None:
        if self._now is not None:
            for kind in self._now.kinds:
                self._costs.setdefault(kind, []).append((self._clock() - self._start) / self._now.count)

    def _left_of_this(self) -> float | None:
        if self._now is None:
            return 0.0
        took = self._clock() - self._start
        if self._done and self._total:
            return (self._clock() - self._pass) * (self._total - self._done) / self._done
        known = self._guess(self._now)
        return None if known is None else max(0.0, known - took)

    def _guess(self, stage: Stage) -> float | None:
        """Seconds for all of a stage, None where none of its kind was seen; of the stage at hand, what it shows so far."""
        here = self._now
        for kind in stage.kinds:
            if kind in self._costs:
                return stage.count * sum(self._costs[kind]) / len(self._costs[kind])
            if here is not None and stage is not here and kind in here.kinds and self._done and self._total:
                return stage.count * (self._clock() - self._start) / (here.count * self._done / self._total)
        return None

    def _tell(self) -> None:
        assert self._now is not None
        seconds, bound = self.left()
        known = seconds > 0 or not bound
        step = Step(
            self._now.what,
            self._done,
            self._total or None,
            self._now.unit,
            seconds if known else None,
            bound and known,
            one_of=self._count,
        )
        self._show(step)
