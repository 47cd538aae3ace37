"""How long work tells how far it is: as calls of (name, done, total), or as one value that says the time left too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

# A name in `Progress` of what comes before the tensors, and counts by itself.
TEXT = "the model writes calibration text"
# What a name in `Progress` begins with while an export is read back, which counts again from nothing.
READ_BACK = "reading it back and comparing"
Progress = Callable[[str, int, int], None]
"""Called as `progress(name of the tensor at hand, bytes done, bytes in all)`. A call that brings no more bytes says what begins; a
second pass over the model counts again from nothing."""


@dataclass(frozen=True)
class Step:
    """Where a long call is.

    what          what is at work, in words, such as "w4 (2 of 8): measuring"
    done, total   how much of it is finished, in `unit`; total is None where that is not known
    unit          "bytes", "%" for the share alone, or what is counted, such as "windows"; empty for a bare count
    seconds_left  until all is done, as far as it can be told; None where it cannot yet
    at_least      whether more is to come whose cost nothing has shown yet, so that `seconds_left` is a lower bound
    note          a few words more for those who watch, such as the memory of the process
    one_of        of how many steps this is one: `done` counts this one, `seconds_left` all of them
    """

    what: str
    done: int = 0
    total: int | None = None
    unit: str = ""
    seconds_left: float | None = None
    at_least: bool = False
    note: str = ""
    one_of: int = field(default=1, compare=False)


OnStep = Callable[[Step], None]

P = TypeVar("P")


def heard(progress: P | bool | None) -> P | None:
    """The callback; None where `progress` only says whether a bar is wanted, which `lowbit.quantize` and its like draw themselves."""
    return None if isinstance(progress, bool) else progress
