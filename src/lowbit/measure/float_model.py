"""The float model that a quantized one is held against: each figure in the type in which this machine is faster.

Which it is depends on the processor and on the figure: reading weights of half the bytes makes decode faster nearly everywhere,
and products of a prompt are faster in bfloat16 where the processor multiplies it, and up to ten times slower where it does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from lowbit.interchange.hf.running import max_positions
from lowbit.measure.backends import Backend, in_transformers, module_times
from lowbit.measure.interleave import BATCH_PROMPT, Probe, SpeedSettings, Times, fit_settings, rate_probes
from lowbit.measure.token_times import torch_threads

Typed = Callable[[torch.dtype], nn.Module]
"""The model in a type. What it gave before may be the same module and be of that type then."""

TYPES = (torch.bfloat16, torch.float32)
_ENOUGH = 2.0  # seconds of trial in one type, after which what was seen is clear


def in_faster_types(typed: Typed, settings: SpeedSettings) -> Backend:
    """The model in transformers, each figure of `settings` in the type that a trial of a few tokens found faster.

    SourceError for a model that generates no text.
    """
    plain = in_transformers(typed(torch.float32))
    types = faster_types(typed, settings)

    def times(dtype: torch.dtype) -> Times:  # cast before the clock starts, when it is asked
        return lambda *lengths: module_times(typed(dtype))(*lengths)

    def probes(wanted: SpeedSettings) -> Mapping[str, Probe]:
        by_type = {dtype: rate_probes(times(dtype), wanted) for dtype in set(types.values())}
        return {name: by_type[dtype][name] for name, dtype in types.items() if name in by_type[dtype]}

    return Backend(f"transformers, {_names(types)}", probes, positions=plain.positions)


def baseline_of(base: nn.Module, typed: Typed, settings: SpeedSettings, threads: int | None) -> Backend:
    """`in_faster_types` found with so many threads; `base` as it is where there is no memory for the other type."""
    with torch_threads(threads):
        try:
            return in_faster_types(typed, settings)
        except MemoryError:
            return in_transformers(base)


def faster_types(typed: Typed, settings: SpeedSettings) -> dict[str, torch.dtype]:
    """The faster of `TYPES` by figure: decode and prefill, and batch where it is asked for."""
    seen: dict[torch.dtype, dict[str, float]] = {}
    for dtype in TYPES:
        model = typed(dtype)
        trial = fit_settings(SpeedSettings(prompt=16, new=6), [max_positions(model)])
        times, start = module_times(model), time.monotonic()
        found: dict[str, list[float]] = {}
        for _ in range(3):  # the first warms up
            alone = times(1, trial.prompt, trial.new)
            figures = {"decode": alone[-1] - alone[0], "prefill": alone[0]}
            if settings.batch > 0:
                figures["batch"] = times(settings.batch, min(BATCH_PROMPT, trial.prompt), 2)[-1]
            for name, seconds in figures.items():
                found.setdefault(name, []).append(seconds)
            if time.monotonic() - start > _ENOUGH:
                break
        seen[dtype] = {name: min(values) for name, values in found.items()}
    return {name: min(TYPES, key=lambda dtype: seen[dtype][name]) for name in seen[TYPES[0]]}


def _names(types: Mapping[str, torch.dtype]) -> str:
    """Such as "float32", or "bfloat16 for decode, float32 for prefill"."""
    names = {name: str(dtype).removeprefix("torch.") for name, dtype in types.items()}
    if len(set(names.values())) == 1:
        return next(iter(names.values()))
    every = dict.fromkeys(names.values())
    return ", ".join(f"{own} for {' and '.join(n for n in names if names[n] == own)}" for own in every)
