"""What each way of storing would cost at the keys, and at the values, of each layer alone.

One run of the float model gives, for every side of every layer and every candidate, the squared error of what attention puts out,
|o' - o|^2. The divergence that such an error leads to at the end of the model is measured for one candidate, with all other
sides exact, and taken as proportional to the squared error for the others (to second order it is: KL(p || p') = 1/2 d' F d for a small
change d of what a layer puts out, F being the Fisher information). Formats of which the sum is too low are found out where the whole
is measured (see `allocate.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import FormatError, RecipeError
from lowbit.kv import CacheFormat, CacheSide
from lowbit.kv.cache_format import Which
from lowbit.measure.kv.replay import Replay
from lowbit.measure.kv.runner import Runner
from lowbit.measure.kv.stored import EXACT, OneSide, StoredSide, stored_side
from lowbit.measure.quality import compare_logits

SIDES: tuple[Which, ...] = ("k", "v")
_TYPICAL = (
    0.01  # relative squared error of the candidate that is measured: far above rounding of float32, and still small
)
Place = tuple[int, Which]


@dataclass(frozen=True)
class Sensitivity:
    """Predicted KL(float cache || one side of one layer stored) in nats per token.

    kl: (layer, "k" or "v") -> candidate -> KL, the first candidate of `candidates` being `int16`, which costs nothing. widths: channels of a
    head of that side. heads: kv heads of the layer. alone: the KL that was measured, and of which candidate.
    """

    candidates: tuple[str, ...]
    kl: Mapping[Place, Mapping[str, float]]
    widths: Mapping[Place, int]
    heads: Mapping[int, int]
    alone: Mapping[Place, tuple[str, float]]

    def total(self, which: Which, candidate: str) -> float:
        """The sum over layers that this candidate would cost for keys or values; infinite where some layer cannot have it."""
        return sum(self.kl[place].get(candidate, math.inf) for place in self.kl if place[1] == which)


def measure_sensitivity(
    runner: Runner, windows: Tensor, candidates: Sequence[str], progress: Callable[[int, int], None] = lambda a, b: None
) -> Sensitivity:
    """Sensitivity on windows [count, tokens], of which the second half of the positions is scored. progress: (done, in all)."""
    errors, norms, widths, heads = _local_errors(runner, windows, candidates, lambda: progress(0, 1))
    chosen = {place: _typical(errors[place], norms[place]) for place in errors}
    rows = slice(windows.shape[1] // 2, windows.shape[1] - 1)
    total = len(chosen) * len(windows)
    sums = dict.fromkeys(chosen, 0.0)
    done = 0
    for ids in windows:
        replay = Replay(runner)
        base = runner.logits(replay.record(ids), rows)
        for place, candidate in chosen.items():
            cache = OneSide(*place, _stored(candidate))
            with replay.up_to(place[0]):
                logits = runner.logits(runner.run(ids, cache), rows)
            sums[place] += float(compare_logits(logits, ids[rows.start + 1 : rows.stop + 1], base)["kl"].mean())
            done += 1
            progress(done, total)
    alone = {place: max(0.0, value / len(windows)) for place, value in sums.items()}
    kl = {
        place: {
            "int16": 0.0,
            **{c: alone[place] * error / errors[place][chosen[place]] for c, error in errors[place].items()},
        }
        for place in errors
    }
    return Sensitivity(
        ("int16", *candidates), kl, widths, heads, {place: (chosen[place], alone[place]) for place in chosen}
    )


def _local_errors(
    runner: Runner, windows: Tensor, candidates: Sequence[str], progress: Callable[[], None]
) -> tuple[dict[Place, dict[str, float]], dict[Place, float], dict[Place, int], dict[int, int]]:
    """Squared errors of what attention puts out, by place and candidate; squared norms of it; widths; kv heads."""
    errors: dict[Place, dict[str, float]] = {}
    norms: dict[Place, float] = {}
    widths: dict[Place, int] = {}
    heads: dict[int, int] = {}

    def seen(
        layer: int, query: Tensor, key: Tensor, value: Tensor, outputs: Callable[[StoredSide, StoredSide], Tensor]
    ) -> None:
        exact = outputs(EXACT, EXACT)
        heads[layer] = key.shape[0]
        for which, x in (("k", key), ("v", value)):
            place: Place = (layer, which)  # type: ignore[assignment]
            widths[place] = x.shape[-1]
            norms[place] = norms.get(place, 0.0) + float(exact.double().square().sum())
            for candidate in candidates:
                if not _possible(candidate, x.shape[-1]):
                    continue
                side = _stored(candidate)
                changed = outputs(side, EXACT) if which == "k" else outputs(EXACT, side)
                error = float((changed - exact).double().square().sum())
                by = errors.setdefault(place, {})
                by[candidate] = by.get(candidate, 0.0) + error
        progress()

    for ids in windows:
        runner.run(ids, None, seen)
    return errors, norms, widths, heads


def _possible(candidate: str, width: int) -> bool:
    """Whether heads of this width can be stored so."""
    side = CacheFormat.of(candidate).keys
    try:
        stored_side(side).read(torch.ones(1, 2, width))  # type: ignore[misc]
    except (RecipeError, FormatError):
        return False
    return True


def _stored(candidate: str) -> StoredSide:
    side: CacheSide = CacheFormat.of(candidate).keys
    return stored_side(side)


def _typical(errors: Mapping[str, float], norm: float) -> str:
    """The candidate whose error is nearest to a small one that is measured well."""
    return min(errors, key=lambda c: abs(math.log(max(errors[c] / max(norm, 1e-30), 1e-30) / _TYPICAL)))
