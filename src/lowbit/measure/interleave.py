"""Interleaved rounds: each measures every program once, so that a slow minute of the machine hits all of them.

The first round warms caches, kernels and clocks, and is thrown away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lowbit.measure.quality import Progress

BATCH_PROMPT = 5  # tokens of "The secret of life is", with which a batch begins
Probe = Callable[[], float]
Times = Callable[[int, int, int], list[float]]
"""Greedy generation by (sequences, tokens of the prompt, new tokens): seconds until each new token."""


@dataclass(frozen=True)
class SpeedSettings:
    """Lengths in tokens. `batch` 0 leaves the batch figure out; `batch_length` includes the prompt.

    seconds: after so many no further round begins, once there was one that counts; None for as long as it takes.
    """

    prompt: int = 64
    new: int = 128
    prefill: int = 512
    batch: int = 20
    batch_length: int = 100
    repeats: int = 3
    seconds: float | None = None


STANDARD = SpeedSettings()
BENCH = SpeedSettings(repeats=5)


def fit_settings(settings: SpeedSettings, limits: Sequence[int | None]) -> SpeedSettings:
    """The settings with every length cut to the shortest of the models' longest sequences."""
    known = [limit for limit in limits if limit is not None]
    longest = min(known) if known else None
    if longest is None:
        return settings
    new = min(settings.new, max(2, longest - settings.prompt), longest // 2)
    return replace(
        settings,
        prompt=min(settings.prompt, longest - new),
        new=new,
        prefill=min(settings.prefill, longest - 1),
        batch_length=min(settings.batch_length, longest),
    )


def rate_probes(times: Times, settings: SpeedSettings) -> dict[str, Probe]:
    """Tokens per second by name: decode, prefill and batch, whose sequences begin with `BATCH_PROMPT` tokens."""

    def decode() -> float:
        found = times(1, settings.prompt, settings.new)
        return (len(found) - 1) / (found[-1] - found[0])

    def prefill() -> float:
        return settings.prefill / times(1, settings.prefill, 1)[-1]

    def batch() -> float:
        found = times(settings.batch, BATCH_PROMPT, settings.batch_length - BATCH_PROMPT)
        return settings.batch * len(found) / found[-1]

    probes: dict[str, Probe] = {"decode": decode, "prefill": prefill}
    if settings.batch > 0 and settings.batch_length > BATCH_PROMPT:
        probes["batch"] = batch
    return probes


def interleave(
    programs: Sequence[Mapping[str, Probe]],
    rounds: int,
    progress: Progress | None = None,
    between: Callable[[], object] | None = None,
    pause: float = 0.0,
    seconds: float | None = None,
) -> list[dict[str, list[float]]]:
    """What each probe of each program found in `rounds` rounds; in a round, probes of one name follow one another.

    between: called before every round, the first included. pause: seconds before each probe: threads of OpenMP go on spinning
    after their last loop, for 0.2 s by default in some runtimes (KMP_BLOCKTIME), on processors that another program needs then.
    seconds: as in `SpeedSettings`.
    """
    names = list(dict.fromkeys(name for program in programs for name in program))
    found: list[dict[str, list[float]]] = [{name: [] for name in program} for program in programs]
    total, done = (rounds + 1) * sum(len(program) for program in programs), 0
    start = time.monotonic()
    for count in range(rounds + 1):
        if seconds is not None and count > 1 and time.monotonic() - start > seconds:
            if progress is not None:
                progress(total, total)
            break
        if between is not None:
            between()
        for name in names:
            for program, values in zip(programs, found, strict=True):
                if name not in program:
                    continue
                time.sleep(pause)
                value = program[name]()
                if count > 0:
                    values[name].append(value)
                done += 1
                if progress is not None:
                    progress(done, total)
    return found
