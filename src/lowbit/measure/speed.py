"""Tokens per second, compared with the base model in the same run.

Machines are noisy and slow down as they warm up, so the two models are measured in interleaved rounds, each figure is the
median of the rounds, and the ratio is what to trust. Three figures:

- decode: greedy generation of one sequence, from its first new token to its last;
- prefill: tokens of the prompt per second until the first new token;
- batch: new tokens per second over several sequences at once, prompt included.

Generation is greedy and of a forced length, whatever the model's own generation settings say. The base is best given as
`float_model.in_faster_types` makes it: each figure in the type in which this machine is faster.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from torch import nn

from lowbit.errors import SourceError
from lowbit.measure.backends import Backend, in_transformers
from lowbit.measure.interleave import STANDARD, SpeedSettings, fit_settings, interleave
from lowbit.measure.quality import Progress
from lowbit.measure.token_times import torch_threads

SHORT = SpeedSettings(new=16, batch=0, seconds=15)


@dataclass(frozen=True)
class Rates:
    """Tokens per second, each the median of the repeats; None when it could not be measured."""

    decode: float
    prefill: float
    batch: float | None = None


@dataclass(frozen=True)
class Speed:
    """Speed of a model, of the base model, and the settings as they were after fitting the model.

    `program` and `base_program`: what ran them, such as "engine (avx2, 2 threads)" or "transformers, float32"; `not_engine`:
    why it was not the engine, where that would have been tried; `alone`: why the base model was not measured beside it. When the model cannot generate, `skipped` says why and the rest is None.
    """

    settings: SpeedSettings | None = None
    model: Rates | None = None
    base: Rates | None = None
    skipped: str | None = None
    program: str | None = None
    base_program: str | None = None
    not_engine: str | None = None
    alone: str | None = None

    def ratio(self, name: str) -> float | None:
        """How many times as fast as the base: `name` is decode, prefill or batch."""
        mine, other = getattr(self.model, name, None), getattr(self.base, name, None)
        return mine / other if mine and other else None


def measure_speed(
    model: nn.Module | Backend,
    *,
    base: nn.Module | Backend | None = None,
    settings: SpeedSettings = STANDARD,
    progress: Progress | None = None,
) -> Speed:
    """Speed of `model`, in rounds interleaved with those of `base` when given; modules are run by transformers.

    Lengths are cut to what the models take. Where the model's program has its own threads, PyTorch gets as many.
    """
    try:
        mine = model if isinstance(model, Backend) else in_transformers(model)
        others = [] if base is None else [base if isinstance(base, Backend) else in_transformers(base)]
    except SourceError as error:
        return Speed(skipped=str(error))
    every = [*others, mine]
    settings = fit_settings(settings, [each.positions for each in every])
    with torch_threads(mine.threads):
        probes = [each.probes(settings) for each in every]
        found = interleave(probes, settings.repeats, progress, seconds=settings.seconds)
    taken = len(found[-1]["decode"])
    rates = [Rates(**{name: statistics.median(values) for name, values in one.items()}) for one in found]
    return Speed(
        replace(settings, repeats=taken), rates[-1], None if base is None else rates[0], program=mine.name,
        base_program=None if base is None else others[0].name, not_engine=mine.note or None,
    )  # fmt: skip
