"""How much of a card fits into so many seconds: the length and number of its windows, from rates that were measured.

Both come from short lists, so that two machines that are nearly as fast as one another measure the same, and so do most runs on one
machine. The figures of a card made in limited time depend on the machine through these choices and through nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lowbit.interchange.pace import Clock
from lowbit.measure.quality import Quality
from lowbit.measure.verdict import near_limit

COUNTS = (2, 4, 8, 16, 24)  # windows
USUAL = 4  # windows, after which measuring ends where the verdict is clear
FACTORS = (1, 2, 4, 8)  # by which windows are shortened
SHORTEST = 128  # tokens


@dataclass
class Budget:
    """So many seconds, from when it is made."""

    seconds: float
    clock: Clock = time.perf_counter
    _start: float = field(init=False)

    def __post_init__(self) -> None:
        self._start = self.clock()

    @property
    def used(self) -> float:
        return self.clock() - self._start

    @property
    def left(self) -> float:
        """Seconds; below 0 when it is overdrawn."""
        return self.seconds - self.used


def length_that_fits(length: int, per_token: float, seconds: float) -> int:
    """The most tokens of a window, `length` or a half, a quarter or an eighth of it, of which the least number of windows takes no more
    than `seconds`; the least of these, but not below `SHORTEST`, where none does. per_token: seconds of one token."""
    every = [length // factor for factor in FACTORS if length // factor >= min(length, SHORTEST)]
    return next((each for each in every if COUNTS[0] * each * per_token <= seconds), every[-1])


@dataclass
class Ladder:
    """How many windows to measure, as `quality.HowMany`: one of `COUNTS`.

    The most that fit into `seconds` by the pace so far: two in any case, four as a rule, and more only where the verdict lies within two
    standard errors of another. Where the work becomes slower than it was, it ends after the window at hand, with the number of
    `COUNTS` that was reached. known: windows that a run before this one measured, which take no time now.
    """

    seconds: float
    clock: Clock = time.perf_counter
    known: int = 0
    _start: float | None = None
    _aim: int = COUNTS[0]

    def __call__(self, done: int, so_far: Callable[[int], Quality]) -> int:
        if self._start is None:
            self._start = self.clock()
            self._aim = next((count for count in COUNTS if count >= self.known), COUNTS[-1])
        if done < self.known or done == 0:
            return self._aim
        took, fresh = self.clock() - self._start, max(1, done - self.known)
        fitting = done + max(0, math.floor((self.seconds - took) / (took / fresh))) if took > 0 else COUNTS[-1]
        if done < COUNTS[0]:
            self._aim = USUAL if fitting >= USUAL else COUNTS[0]
        elif took > self.seconds:
            self._aim = max(count for count in COUNTS if count <= done)
        elif done >= self._aim:
            more = next((count for count in COUNTS if count > done), done)
            if more <= fitting and not (done >= USUAL and is_clear(so_far(done))):
                self._aim = more
        return self._aim


def is_clear(quality: Quality) -> bool:
    """Whether the verdict by the KL divergence lies more than two standard errors from any other; True where there is no divergence."""
    kl = quality.kl_mean
    return kl is None or (kl.stderr is not None and near_limit(kl.value, kl.stderr) is None)
