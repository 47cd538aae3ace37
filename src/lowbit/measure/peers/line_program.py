"""Any program that measures itself and says so line by line."""

from __future__ import annotations

import math
import shlex
import subprocess
from collections.abc import Mapping
from functools import partial
from typing import Any

from lowbit.errors import LowbitError
from lowbit.measure.backends import Backend
from lowbit.measure.interleave import BENCH
from lowbit.measure.peers.peer import Opener, peer


@peer
def line_programs(asked: Mapping[str, Any], threads: int) -> list[Opener]:
    """programs: commands by name; each looks to its threads itself."""
    return [partial(run_by_lines, name, command) for name, command in (asked["programs"] or {}).items()]


def run_by_lines(name: str, command: str) -> Backend:
    """A program that stays loaded: it says `ready`, and to each line `decode`, `prefill` or `batch` answers tokens/s.

    It measures with the standard settings of `bench`. LowbitError when it stops or says something else.
    """
    try:
        process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except (OSError, ValueError) as error:
        raise LowbitError(f"{command!r} cannot be run: {error}; name a program and its arguments") from None
    to, answers = process.stdin, process.stdout
    assert to is not None and answers is not None
    if not any(line.strip() == "ready" for line in answers):
        raise LowbitError(f"{command!r} ended with {process.wait()} before it said 'ready'; run it by hand to see why")

    def ask(what: str) -> float:
        try:
            print(what, file=to, flush=True)
        except OSError:
            raise LowbitError(f"{command!r} has stopped; run it by hand to see why") from None
        answer = answers.readline().strip()
        try:
            rate = float(answer)
        except ValueError:
            rate = math.nan
        if not (math.isfinite(rate) and rate > 0):
            raise LowbitError(f"{command!r} answered {answer!r} to {what!r}; it must say tokens per second")
        return rate

    names = ("decode", "prefill", "batch")
    return Backend(name, lambda _: {what: partial(ask, what) for what in names}, fixed=BENCH, close=process.kill)
