"""A way of storing for the keys and the values of each layer: the fewest bits within a limit of divergence, verified as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from lowbit.budget.knapsack import choose
from lowbit.kv import CacheFormat, CacheSide
from lowbit.kv.cache_format import Which
from lowbit.kv.side import parse_side
from lowbit.measure.kv.sensitivity import SIDES, Place, Sensitivity
from lowbit.measure.kv.size import side_bytes

# 8 to 2 bits; what keeps outliers of channels apart (rotation, groups of tokens) and what does not. All keep the newest 32 tokens
# exactly, which costs little in a long context, so that any of keys goes with any of values in the engine, which computes them all.
CANDIDATES = (
    "int8:recent=32", "rotate+norm@int6:recent=32", "rotate+norm@int5:recent=32", "uint4:32x1:min=fp16:recent=32",
    "uint4:g32:min=fp16:recent=32", "rotate+norm@normal4:g32:recent=32", "rotate+norm@normal4:recent=32", "uint3:32x1:min=fp16:recent=32",
    "uint3:g32:min=fp16:recent=32", "rotate+norm@normal3:g32:recent=32", "rotate+norm@normal3:recent=32", "uint2:32x1:min=fp16:recent=32",
    "rotate+norm@normal2:g32:recent=32",
)  # fmt: skip
_TRIES = 5
_MARGIN = 0.95  # of the limit is aimed at, once it is known how predictions and measurements go together
_ENOUGH = 0.9  # of the limit is used: the search ends


@dataclass(frozen=True)
class Trial:
    """A choice that was measured as a whole: its KL in nats per token, and whether all else that was asked holds."""

    format: CacheFormat
    bytes: int
    predicted: float
    kl: float
    holds: bool


def search(
    sensitivity: Sensitivity, context: int, limit: float, measure: Callable[[CacheFormat], tuple[float, bool]]
) -> Iterator[Trial]:  # fmt: skip
    """Choices from the first one on, each predicted better by what the last one measured; `best` picks of them.

    context: tokens at which bytes are counted. measure: of a format, its KL in nats per token and whether it holds otherwise.
    """
    capacity, tried = limit, set[str]()
    for _ in range(_TRIES):
        picks = _choose(sensitivity, context, capacity)
        predicted = sum(sensitivity.kl[place][c] for place, c in picks.items())
        fmt = cache_format(picks)
        if str(fmt) in tried:
            return
        tried.add(str(fmt))
        kl, holds = measure(fmt)
        yield Trial(fmt, _bytes(sensitivity, picks, context), predicted, kl, holds and kl <= limit)
        if _ENOUGH * limit <= kl <= limit and holds:
            return
        if kl <= limit and not holds:
            capacity /= 4
        elif predicted > 0 and kl > 0:
            capacity = _MARGIN * limit * predicted / kl
        else:
            capacity = capacity * 4 if kl <= limit else capacity / 4


def best(trials: list[Trial]) -> Trial | None:
    """The one of fewest bytes that holds; None where none does."""
    return min((trial for trial in trials if trial.holds), key=lambda trial: trial.bytes, default=None)


def _choose(sensitivity: Sensitivity, context: int, capacity: float) -> dict[Place, str]:
    places = list(sensitivity.kl)
    options = [list(sensitivity.kl[place]) for place in places]
    sizes = [
        [float(_side_bytes(sensitivity, place, c, context)) for c in cs]
        for place, cs in zip(places, options, strict=True)
    ]
    values = [[sensitivity.kl[place][c] for c in cs] for place, cs in zip(places, options, strict=True)]
    found = choose(sizes, values, capacity)
    assert found is not None  # int16 costs nothing
    return {place: cs[pick] for place, cs, pick in zip(places, options, found.picks, strict=True)}


def _side_bytes(sensitivity: Sensitivity, place: Place, candidate: str, context: int) -> int:
    return sensitivity.heads[place[0]] * side_bytes(parse_side(candidate), context, sensitivity.widths[place])


def _bytes(sensitivity: Sensitivity, picks: Mapping[Place, str], context: int) -> int:
    return sum(_side_bytes(sensitivity, place, c, context) for place, c in picks.items())


def cache_format(picks: Mapping[Place, str]) -> CacheFormat:
    """What is chosen for each side as one format: the commonest for keys and for values, and layers that differ."""
    common: dict[Which, CacheSide] = {}
    rules: list[tuple[str, Which, CacheSide]] = []
    for which in SIDES:
        counted = Counter(c for (_, side), c in picks.items() if side == which)
        most = max(counted, key=lambda c: (counted[c], c))
        common[which] = parse_side(most)
        for other in sorted(set(counted) - {most}):
            layers = [i for (i, side), c in picks.items() if side == which and c == other]
            rules += [(glob, which, parse_side(other)) for glob in globs(layers)]
    return CacheFormat(common["k"], common["v"], tuple(rules))


def globs(numbers: list[int]) -> list[str]:
    """Globs that match these numbers and no others, one for each ten: [0, 1, 2, 15, 17] is ['[012]', '1[57]'].

    >>> from lowbit.measure.kv.allocate import globs
    >>> globs([0, 1, 2, 15])
    ['[012]', '15']
    """
    tens: dict[int, list[int]] = {}
    for number in sorted(numbers):
        tens.setdefault(number // 10, []).append(number % 10)
    lead = {ten: str(ten) if ten else "" for ten in tens}
    return [
        f"{lead[ten]}{ends[0]}" if len(ends) == 1 else f"{lead[ten]}[{''.join(map(str, ends))}]"
        for ten, ends in tens.items()
    ]
