"""Mixed precision: which format each layer gets, so that a model of a given size is as good as it can be.

Predicted KL divergences (sensitivity.py) are additive over tensors and sizes are exact, so this is a multiple-choice
knapsack (knapsack.py). Layers that an engine fuses get one format. The result is an ordinary recipe: printable,
saveable, and followed later without the measurement.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lowbit.budget.allocation import Allocation, Row
from lowbit.budget.knapsack import choose
from lowbit.budget.sensitivity import Sensitivity
from lowbit.budget.sizes import parse_size
from lowbit.errors import RecipeError
from lowbit.families.fused import TOGETHER
from lowbit.formats import Format, parse_format
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import MULTIPLIED, Specs, TensorPlan
from lowbit.planning.plan import MAX_SHARD, Plan, make_plan
from lowbit.recipes.layer_globs import with_layers
from lowbit.recipes.recipe import Recipe

# Last words of names that read the same input, which engines (vLLM, llama.cpp and others) store as one matrix.
SHARE = tuple(parts for _, parts in TOGETHER)
# Beside weights and KV cache: Python with PyTorch or a device context, and the activations of a batch of one.
OVERHEAD = 600_000_000
_WITHIN = 0.01


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
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise RecipeError(f"one target is needed of {', '.join(targets)}; given: {', '.join(given) or 'none'}")
    (name, value), base = next(iter(given.items())), Recipe.of(recipe)
    sensitivity.check(source)
    problem = _Problem(source, sensitivity, base, embeddings, share, context, max_shard_bytes)
    if name == "target_kl":
        return problem.smallest(_positive(name, value))
    if name == "target_bits":
        return problem.within_bits(_positive(name, value))
    if name == "target_size":
        return problem.within_bytes(parse_size(value))
    plan = problem.plan(problem.uniform(problem.options[0]))
    return problem.within_bytes(parse_size(value), plan.kv.bytes_at(context) * sequences + overhead, at_most=True)


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise RecipeError(f"{name} is a number above 0, not {value!r}")
    return float(value)


class _Problem:
    """Groups of tensors that share a format, and for each the size and predicted KL of every option."""

    def __init__(
        self, source: Source, sensitivity: Sensitivity, recipe: Recipe, embeddings: bool,
        share: Sequence[Sequence[str]], context: int, max_shard_bytes: int,
    ) -> None:  # fmt: skip
        self.source, self.sensitivity, self.recipe = source, sensitivity, recipe
        self.context, self.max_shard_bytes = context, max_shard_bytes
        self.embeddings = embeddings
        tensors = make_plan(source, recipe).tensors
        kinds = MULTIPLIED + (("embedding", "head") if embeddings else ())
        self.tensors = {t.name: t for t in tensors}
        self.kinds = {n: p.kind for n, p in source.inventory.params.items() if p.keep is None}
        self.options = [parse_format(text) for text in sensitivity.candidates]
        free = [
            t for t in tensors
            if t.name in self.kinds and t.kind in kinds and not any(recipe.matches(p, t.name) for p, _ in recipe.layers)
        ]  # fmt: skip
        if not free:
            raise RecipeError(f"no layer of {source.label} is left to allocate: the recipe {recipe} decides them all")
        for t in free:
            if t.name not in sensitivity.kl:
                raise RecipeError(f"the sensitivity lacks {t.name!r}; measure it again with this model")
        self.groups = _groups(free, share)
        stored = [
            [[TensorPlan(t.name, t.shape, t.kind, t.dtype, t.transposed, f, None) for t in g] for f in self.options]
            for g in self.groups
        ]
        self.data = [[float(sum(t.bytes_after for t in ts)) for ts in by_option] for by_option in stored]
        self.sizes = [
            [float(sum(t.bytes_after + _header_bytes(t.stored()) for t in ts)) for ts in by_option]
            for by_option in stored
        ]
        self.kl = [[sum(sensitivity.kl[t.name][str(f)] for t in g) for f in self.options] for g in self.groups]

    def uniform(self, option: Format) -> tuple[int, ...]:
        """The picks of one format for all."""
        return (self.options.index(option),) * len(self.groups)

    def plan(self, picks: Sequence[int]) -> Plan:
        """The exact plan of picks."""
        recipe = self.as_recipe(picks)
        return make_plan(self.source, recipe, context=self.context, max_shard_bytes=self.max_shard_bytes)

    def as_recipe(self, picks: Sequence[int]) -> Recipe:
        """The recipe of picks; its format is the one that most weights have and that its method serves."""
        chosen: dict[str, Format | None] = {}
        weights: defaultdict[Format, int] = defaultdict(int)
        for group, pick in zip(self.groups, picks):
            for t in group:
                chosen[t.name] = self.options[pick]
                if t.kind in MULTIPLIED:
                    weights[self.options[pick]] += t.count
        calls = [call for call in (self.recipe.fit, self.recipe.solver) if call is not None]
        served = [f for f in weights if all(call.method.declines(f) is None for call in calls)]
        base = max(served, key=lambda f: weights[f], default=self.recipe.format)
        return with_layers(self.recipe, chosen, self.kinds, base)

    def within_bytes(self, target: int, reserved: int = 0, at_most: bool = False) -> Allocation:
        """Files of at most `target - reserved` bytes; a target beyond all candidates is an error unless `at_most`."""
        limit = target - reserved
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
            least = self.plan(tuple(min(range(len(s)), key=s.__getitem__) for s in self.sizes)).output_bytes
            raise RecipeError(
                f"{_size(target)} is too little: the smallest that the candidates make of {self.source.label} is "
                f"{_size(least + reserved)}" + (f", {_size(reserved)} of it beside the weights" if reserved else "")
            )
        plan = self.plan(picks)
        if not at_most and plan.output_bytes < (1 - _WITHIN) * target:
            largest = self.plan(tuple(max(range(len(s)), key=s.__getitem__) for s in self.sizes)).output_bytes
            if largest < (1 - _WITHIN) * target:
                raise RecipeError(_too_much(_size(target), _size(largest)))
        return self._allocation(plan, picks, bound, limit)

    def within_bits(self, target: float) -> Allocation:
        """Linear layers of at most `target` bits per weight, kept ones counted as they are."""
        if self.embeddings:
            raise RecipeError("target_bits counts linear layers only; leave embeddings out, or give a target_size")
        linear = [t for t in self.tensors.values() if t.kind in MULTIPLIED]
        count, free = sum(t.count for t in linear), {t.name for g in self.groups for t in g}
        fixed = sum(t.bytes_after for t in linear if t.name not in free)
        found = choose(self.kl, self.data, math.floor(target * count / 8 * (1 + 1e-12)) - fixed)
        if found is None:
            least = 8 * (fixed + sum(min(s) for s in self.data)) / count
            raise RecipeError(f"{target:g} bits are too few: the candidates reach {least:.4f} bits per weight")
        plan = self.plan(found.picks)
        if plan.linear_bits_per_weight < (1 - _WITHIN) * target:
            largest = 8 * (fixed + sum(max(s) for s in self.data)) / count
            if largest < (1 - _WITHIN) * target:
                raise RecipeError(_too_much(f"{target:g} bits per weight", f"{largest:.4f}"))
        return self._allocation(plan, found.picks, found.bound, None)

    def smallest(self, kl: float) -> Allocation:
        """The smallest files whose predicted KL is at most `kl`, that of fixed tensors included."""
        fixed = sum(row.kl or 0.0 for row in self._rows(self.plan(self.uniform(self.options[0]))) if row.fixed)
        found = choose(self.sizes, self.kl, kl - fixed)
        if found is None:
            least = fixed + sum(min(k) for k in self.kl)
            raise RecipeError(f"a KL of {kl:g} is out of reach: the candidates reach {least:.3g} nats per token")
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


def _groups(tensors: Sequence[TensorPlan], share: Sequence[Sequence[str]]) -> list[list[TensorPlan]]:
    """Tensors that get one format: neighbours whose last words are in one entry of `share`."""
    entry = {word: i for i, words in enumerate(share) for word in words}
    groups: dict[tuple[str, int | str], list[TensorPlan]] = {}
    for t in tensors:
        parent, _, word = t.name.removesuffix(".weight").rpartition(".")
        groups.setdefault((parent, entry.get(word, word)), []).append(t)
    return list(groups.values())


def _header_bytes(stored: Specs) -> int:
    """About what a tensor takes in the header of a file; what is amiss (digits) the exact plan makes up for."""
    entries = {
        name: {"dtype": "BF16", "shape": list(shape), "data_offsets": [10**9, 10**9]}
        for name, (_, shape) in stored.items()
    }
    return len(json.dumps(entries, separators=(",", ":"))) - 1


def _too_much(target: str, largest: str) -> str:
    return f"{target} is more than these candidates reach, {largest} at most: ask for that, or measure wider candidates"


def _size(size: int) -> str:
    return f"{size:,} bytes"
