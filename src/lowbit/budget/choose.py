"""Mixed precision: which format each layer gets, so that a model of a given size is as good as it can be.

Predicted KL divergences (sensitivity.py) are additive over tensors and sizes are exact, so this is a multiple-choice
knapsack (knapsack.py). Layers that an engine fuses get one format. The result is an ordinary recipe: printable,
saveable, and followed later without the measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lowbit.budget.allocation import Allocation, Row
from lowbit.budget.choices import SHARE, Choices
from lowbit.budget.knapsack import choose
from lowbit.budget.memory import OVERHEAD
from lowbit.budget.reach import Room, check_bits, check_bytes, room, the_target, too_few, too_little
from lowbit.budget.sensitivity import Sensitivity
from lowbit.errors import RecipeError
from lowbit.interchange.source import Source
from lowbit.planning.plan import MAX_SHARD, Plan
from lowbit.recipes.recipe import Recipe


def allocate(
    source: Source, sensitivity: Sensitivity, recipe: str | Recipe = "search@int4:g32", **target: Any
) -> Recipe:  # fmt: skip
    """The recipe of `allocation`, whose arguments these are."""
    return allocation(source, sensitivity, recipe, **target).recipe


def allocation(
    source: Source,
    sensitivity: Sensitivity,
    recipe: str | Recipe = "search@int4:g32",
    *,
    target_size: int | str | None = None,
    target_bits: float | None = None,
    target_kl: float | None = None,
    fit_memory: int | str | None = None,
    context: int = 4096,
    sequences: int = 1,
    overhead: int = OVERHEAD,
    embeddings: bool = False,
    share: Sequence[Sequence[str]] = SHARE,
    max_shard_bytes: int = MAX_SHARD,
) -> Allocation:
    """Formats of all layers for one target, by the least predicted KL.

    target_size  bytes of all weight files, headers and index included, as `Plan.output_bytes` counts them
    target_bits  bits per weight in the linear layers, as `Plan.linear_bits_per_weight` counts them
    target_kl    the smallest size whose predicted KL, in nats per token, is at most this
    fit_memory   bytes for weights, the KV cache of `sequences` of `context` tokens, and `overhead`

    Sizes and bits are met from below, within 1 % in any model of a few dozen layers; where layers are too few for that
    the best below the target is taken. `recipe` gives method and embeddings, and its layer globs are kept:
    what they decide is not allocated, but counted. `embeddings` allocates embeddings and heads too. `share`: last words
    of neighbouring names that get one format. Sizes are text such as "80MB" or bytes.
    RecipeError when the target cannot be met, with the nearest one that can.
    """
    targets = {"target_size": target_size, "target_bits": target_bits, "target_kl": target_kl, "fit_memory": fit_memory}
    name, value = the_target(targets)
    sensitivity.check(source)
    problem = _Problem(
        source, sensitivity, Recipe.of(recipe), embeddings=embeddings, share=share, context=context,
        max_shard_bytes=max_shard_bytes,
    )  # fmt: skip
    if name == "target_kl":
        return problem.within_kl(value)
    if name == "target_bits":
        return problem.within_bits(value)
    return problem.within_bytes(room(problem, name, value, sequences, overhead))


class _Problem(Choices):
    """The same with the predicted KL of every option of every group."""

    def __init__(self, source: Source, sensitivity: Sensitivity, recipe: Recipe, **how: Any) -> None:
        super().__init__(source, recipe, sensitivity.candidates, **how)
        for t in (t for g in self.groups for t in g):
            if t.name not in sensitivity.kl:
                raise RecipeError(f"the sensitivity lacks {t.name!r}; measure it again with this model")
        self.sensitivity = sensitivity
        self.kl = [[sum(sensitivity.kl[t.name][str(f)] for t in g) for f in self.options] for g in self.groups]

    def within_bytes(self, room: Room) -> Allocation:
        """Files of at most `room.limit` bytes; a target beyond all candidates is an error unless it is a limit only."""
        check_bytes(self, room)
        limit = room.limit
        uniform = [self.uniform(f) for f in self.options]
        exact = [self.plan(picks).output_bytes for picks in uniform]
        # What files hold beyond the sizes that are summed here: fixed tensors, and the digits of offsets, which no
        # sum knows. So the least of it is tried, and what is too large gives way until the exact plan fits.
        fixed = min(size - sum(s[p[0]] for s in self.sizes) for size, p in zip(exact, uniform))
        known = min(
            ((sum(k[p[0]] for k in self.kl), p) for size, p in zip(exact, uniform) if size <= limit),
            default=(math.inf, None),
        )
        bound, picks, plan = None, known[1], None
        while (found := choose(self.kl, self.sizes, limit - fixed)) is not None:
            bound = found.bound if bound is None else bound
            if found.value >= known[0]:
                break
            plan = self.plan(found.picks)
            if plan.output_bytes <= limit:
                picks = found.picks
                break
            fixed += plan.output_bytes - limit
        if picks is None:
            raise too_little(self, room)
        plan = self.plan(picks)
        return self._allocation(plan, picks, bound, limit)

    def within_bits(self, target: float) -> Allocation:
        """Linear layers of at most `target` bits per weight, kept ones counted as they are."""
        check_bits(self, target)
        count, fixed = self.linear()
        found = choose(self.kl, self.data, math.floor(target * count / 8 * (1 + 1e-12)) - fixed)
        if found is None:
            raise too_few(self, target)
        plan = self.plan(found.picks)
        return self._allocation(plan, found.picks, found.bound, None)

    def within_kl(self, kl: float) -> Allocation:
        """The smallest files whose predicted KL is at most `kl`, that of fixed tensors included."""
        fixed = sum(row.kl or 0.0 for row in self._rows(self.plan(self.uniform(self.options[0]))) if row.fixed)
        found = choose(self.sizes, self.kl, kl - fixed)
        if found is None:
            least = fixed + sum(min(k) for k in self.kl)
            raise RecipeError(
                f"a KL divergence of {kl:g} cannot be reached: with these formats the least is {least:.3g} nats per token"
            )
        return self._allocation(self.plan(found.picks), found.picks, None, None)

    def _rows(self, plan: Plan) -> list[Row]:
        free = {t.name for g in self.groups for t in g}
        rows = []
        for t in plan.tensors:
            if t.name in self.kinds:
                measured = self.sensitivity.kl.get(t.name, {})
                kl = 0.0 if t.format is None else measured.get(str(t.format))
                bits = 8 * t.bytes_after / max(1, t.count)
                rows.append(Row(t.name, t.kind, t.count, t.format, bits, kl, t.name not in free))
        return rows

    def _allocation(self, plan: Plan, picks: Sequence[int], bound: float | None, limit: int | None) -> Allocation:
        """The result; `bound`: the least KL that any choice could have, None where KL was not what was minimised."""
        rows, value = tuple(self._rows(plan)), sum(k[c] for k, c in zip(self.kl, picks))
        for group, pick in zip(self.groups, picks):  # the globs must say what was chosen
            for t in group:
                assert plan.recipe.format_for(t.name, t.kind) == self.options[pick], t.name
        gap = 0.0 if bound is None else max(0.0, value - bound)
        return Allocation(plan.recipe, plan, rows, sum(r.kl or 0.0 for r in rows), gap, limit)
