"""Divergence from the float cache by position: the drift curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from lowbit.kernels.heap import trim
from lowbit.measure.kept import Figures
from lowbit.measure.kv.figures import DECILES, Decile
from lowbit.measure.kv.runner import Runner
from lowbit.measure.kv.stored import Cache
from lowbit.measure.quality import Estimate, check_base, compare_logits, mean_estimate

_ROWS = 512  # logits of so many positions are in memory at once, twice


@dataclass(frozen=True)
class Drift:
    """Figures of each token of all windows, by name (see `compare_logits`): float64 [windows, tokens]."""

    figures: Figures

    @property
    def kl(self) -> Estimate:
        """Mean KL(float || quantized) in nats per token."""
        return self.mean("kl")

    def mean(self, name: str) -> Estimate:
        """The mean of a figure, such as "top1"."""
        return mean_estimate(self.figures[name])

    def perplexity(self, name: str = "nll") -> Estimate:
        """Perplexity; of the float cache where name is "base_nll". Its standard error by the delta method."""
        mean = self.mean(name)
        value = float(np.exp(np.minimum(mean.value, 700.0)))
        return Estimate(value, None if mean.stderr is None else value * mean.stderr)

    def deciles(self) -> tuple[Decile, ...]:
        """Tenths of the context; fewer where there are fewer tokens."""
        count = self.figures["kl"].shape[1]
        edges = np.linspace(0, count, min(DECILES, count) + 1).round().astype(int)
        return tuple(
            Decile(int(a), int(b), *(mean_estimate(self.figures[name][:, a:b]) for name in ("kl", "top1")))
            for a, b in pairwise(edges)
        )


def drifts(
    runner: Runner, windows: Tensor, caches: Sequence[Cache], skip: int = 0, progress: Callable[[], None] = lambda: None
) -> list[Drift]:  # fmt: skip
    """Each cache beside the float one over windows [count, tokens]; the float model sees each window once.

    skip: tokens at the beginning that are not scored. progress: called after each run of a window. SourceError where the float
    model's logits are not finite.
    """
    parts: list[list[Figures]] = [[] for _ in caches]
    for ids in windows:
        states = [runner.base(ids)]
        progress()
        for cache in caches:
            states.append(runner.run(ids, cache))
            progress()
        chunks: list[list[Figures]] = [[] for _ in caches]
        first = max(skip, 1) - 1  # row t predicts token t + 1
        for start in range(first, len(ids) - 1, _ROWS):
            rows = slice(start, min(start + _ROWS, len(ids) - 1))
            base = runner.logits(states[0], rows)
            targets = ids[rows.start + 1 : rows.stop + 1]
            for found, state in zip(chunks, states[1:], strict=True):
                found.append(compare_logits(runner.logits(state, rows), targets, base))
        for part, found in zip(parts, chunks, strict=True):
            part.append({name: np.concatenate([chunk[name] for chunk in found]) for name in found[0]})
            check_base(part[-1])
        del states
        trim()
    return [Drift({name: np.stack([one[name] for one in part]) for name in part[0]}) for part in parts]
