"""What is chosen from under a target: groups of tensors that share a format, and the size of every format for each.

Sizes follow from config and headers alone, so that a target which no choice meets is known before a weight is read
(`reach.py`).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

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


class Choices:
    """Groups of tensors that share a format, and for each the size of every option.

    options   the formats that are chosen from
    groups    tensors that get one format
    data      group -> option -> bytes of its tensors; `sizes`: what they take in the header of a file included
    """

    def __init__(
        self, source: Source, recipe: Recipe, candidates: Sequence[str], *, embeddings: bool = False,
        share: Sequence[Sequence[str]] = SHARE, context: int = 4096, max_shard_bytes: int = MAX_SHARD,
    ) -> None:  # fmt: skip
        self.source, self.recipe, self.embeddings = source, recipe, embeddings
        self.context, self.max_shard_bytes = context, max_shard_bytes
        tensors = make_plan(source, recipe).tensors
        kinds = MULTIPLIED + (("embedding", "head") if embeddings else ())
        self.tensors = {t.name: t for t in tensors}
        self.kinds = {n: p.kind for n, p in source.inventory.params.items() if p.keep is None}
        self.options = [parse_format(text) for text in candidates]
        free = [
            t for t in tensors
            if t.name in self.kinds and t.kind in kinds and not any(recipe.matches(p, t.name) for p, _ in recipe.layers)
        ]  # fmt: skip
        if not free:
            raise RecipeError(f"no layer of {source.label} is left to allocate: the recipe {recipe} decides them all")
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

    def smallest(self) -> tuple[int, ...]:
        """The picks of the fewest bytes."""
        return tuple(min(range(len(s)), key=s.__getitem__) for s in self.sizes)

    def largest(self) -> tuple[int, ...]:
        """The picks of the most bytes."""
        return tuple(max(range(len(s)), key=s.__getitem__) for s in self.sizes)

    def linear(self) -> tuple[int, int]:
        """(weights of all linear layers, bytes of those of them that are not chosen)."""
        linear = [t for t in self.tensors.values() if t.kind in MULTIPLIED]
        free = {t.name for g in self.groups for t in g}
        return sum(t.count for t in linear), sum(t.bytes_after for t in linear if t.name not in free)


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
