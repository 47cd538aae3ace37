"""Whether a target can be met at all, from sizes alone: before sensitivity is measured, text read or weights fetched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowbit.budget.choices import Choices
from lowbit.budget.memory import OVERHEAD, running_memory
from lowbit.budget.sizes import parse_size, size_text
from lowbit.errors import RecipeError
from lowbit.interchange.source import Source
from lowbit.planning.kv_cache import KVCache
from lowbit.planning.plan import make_plan
from lowbit.recipes.recipe import Recipe

_WITHIN = 0.01  # how near to a target its result comes
_FEWEST_BITS = 4  # of an embedding that is proposed to save space
_MUCH = 0.2  # of the smallest result: from here on the embedding is worth a word

TARGETS = ("target_size", "target_bits", "target_kl", "fit_memory")


@dataclass(frozen=True)
class Room:
    """Bytes for the files: `target` without what is `reserved` for `cache` and `overhead`.

    at_most: more room than any choice fills is no mistake. kv, sequences: the cache grows with the context.
    """

    target: int
    cache: int = 0
    overhead: int = 0
    at_most: bool = False
    kv: KVCache | None = None
    sequences: int = 1
    context: int = 0

    @property
    def reserved(self) -> int:
        return self.cache + self.overhead

    @property
    def limit(self) -> int:
        return self.target - self.reserved


def the_target(targets: Mapping[str, Any]) -> tuple[str, Any]:
    """(name, value) of the one target that is given. RecipeError for none, for several, and for what is no number."""
    given = {name: targets[name] for name in TARGETS if targets.get(name) is not None}
    if len(given) != 1:
        raise RecipeError(f"one target is needed of {', '.join(TARGETS)}; given: {', '.join(given) or 'none'}")
    name, value = next(iter(given.items()))
    return name, _positive(name, value) if name in ("target_bits", "target_kl") else value


def room(choices: Choices, name: str, value: Any, sequences: int = 1, overhead: int = OVERHEAD) -> Room:
    """What a target of bytes (`target_size`, `fit_memory`) leaves for the files."""
    if name == "target_size":
        return Room(parse_size(value))
    kv = choices.plan(choices.uniform(choices.options[0])).kv
    beside = running_memory(0, kv, choices.context, sequences, overhead)
    return Room(parse_size(value), beside.cache, beside.working, True, kv, sequences, choices.context)


def check_reach(source: Source, recipe: Recipe, candidates: Sequence[str], **target: Any) -> None:
    """RecipeError for a target of `allocation` (whose arguments `target` has) that no choice meets; no weight is read.

    A predicted KL is known only when it was measured, so that `target_kl` is held to be a number and no more.
    """
    name, value = the_target(target)
    of_room = {key: target[key] for key in ("sequences", "overhead") if key in target}
    how = {key: v for key, v in target.items() if key not in (*TARGETS, *of_room)}
    if name == "target_kl":
        return
    choices = Choices(source, recipe, candidates, **how)
    if name == "target_bits":
        check_bits(choices, value)
    else:
        check_bytes(choices, room(choices, name, value, **of_room))


def check_bytes(choices: Choices, room: Room) -> None:
    """RecipeError when the smallest choice is too large for the room, or the largest far too small."""
    if choices.plan(choices.smallest()).output_bytes > room.limit:
        raise too_little(choices, room)
    if not room.at_most and (largest := choices.plan(choices.largest()).output_bytes) < (1 - _WITHIN) * room.target:
        raise _too_much(_size(room.target), _size(largest))


def check_bits(choices: Choices, target: float) -> None:
    """RecipeError when no choice has so few, or so many, bits per weight in the linear layers."""
    if choices.embeddings:
        raise RecipeError("target_bits counts linear layers only; leave embeddings out, or give a target_size")
    count, fixed = choices.linear()
    if math.floor(target * count / 8 * (1 + 1e-12)) < fixed + sum(min(s) for s in choices.data):
        raise too_few(choices, target)
    largest = 8 * (fixed + sum(max(s) for s in choices.data)) / count
    if largest < (1 - _WITHIN) * target:
        raise _too_much(f"{target:g} bits per weight", f"{largest:.4f}")


def too_little(choices: Choices, room: Room) -> RecipeError:
    """The error for a room that the smallest choice does not fit, with what would."""
    plan = choices.plan(choices.smallest())
    needed = plan.output_bytes + room.reserved
    beside = f", of which {_size(room.reserved)} are not for weights" if room.reserved else ""
    if room.kv is not None:
        cache = f"{size_text(room.cache)} for the KV cache of {room.context:,} tokens" if room.cache else ""
        parts = [part for part in (cache, f"{size_text(room.overhead)} for Python and activations") if part]
        beside += f" ({', '.join(parts)})" if room.reserved else ""
    ways = [f"ask for {size_text(needed)} or more"]
    if room.kv is not None and (context := _longest(room, plan.output_bytes)):
        ways.append(f"for a context of at most {context:,} tokens")
    if (saved := _smaller_embedding(choices, room, plan.output_bytes)) is not None:
        text, nbytes = saved
        size, named = size_text(nbytes + room.reserved), choices.recipe.name
        option = "fit-memory" if room.kv is not None else "target-size"
        typed = f": `lowbit quantize MODEL {named},embed={text} --{option} {size}`" if named else ""
        ways.append(f"add embed={text} to the recipe, which makes it {size}{typed}")
    return RecipeError(
        f"{_size(room.target)} is too little: the smallest that the formats it may choose from make of {choices.source.label} is "
        f"{_size(needed)}{beside}; {', or '.join(ways)}"
    )


def too_few(choices: Choices, target: float) -> RecipeError:
    """The error for bits that no choice reaches, with the fewest that one does."""
    count, fixed = choices.linear()
    least = 8 * (fixed + sum(min(s) for s in choices.data)) / count
    return RecipeError(
        f"{target:g} bits are too few: these formats reach {least:.4f} bits per weight in the linear layers; ask for "
        f"{math.ceil(least * 100) / 100:g} or more"
    )


def _longest(room: Room, weights: int) -> int:
    """The longest context whose cache fits beside the smallest weights; 0 where none does."""
    assert room.kv is not None
    left, low, high = room.target - room.overhead - weights, 0, room.context
    while low < high:  # the cache grows with the context
        middle = (low + high + 1) // 2
        low, high = (middle, high) if room.kv.bytes_at(middle) * room.sequences <= left else (low, middle - 1)
    return low


def _smaller_embedding(choices: Choices, room: Room, least: int) -> tuple[str, int] | None:
    """(format, bytes of the smallest choice with it) where the embedding is much of what is needed and could be smaller."""
    own = sum(t.bytes_after for t in choices.tensors.values() if t.kind in ("embedding", "head"))
    few = [f for f in choices.options if f.grid.bits >= _FEWEST_BITS]
    if choices.embeddings or not few or own < _MUCH * (least + room.reserved):
        return None
    fmt = max((f for f in few if f.grid.bits == min(f.grid.bits for f in few)), key=lambda f: f.nbytes((1, 4096)))
    if choices.recipe.embed is None or choices.recipe.embed.grid.bits <= fmt.grid.bits:
        return None
    smaller = replace(choices.as_recipe(choices.smallest()), embed=fmt)
    found = make_plan(choices.source, smaller, max_shard_bytes=choices.max_shard_bytes).output_bytes
    return (str(fmt), found) if found < least else None


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise RecipeError(f"{name} is a number above 0, not {value!r}")
    return float(value)


def _too_much(target: str, largest: str) -> RecipeError:
    return RecipeError(
        f"{target} is more than these formats reach, {largest} at most: ask for that, or give formats with more bits"
    )


def _size(size: int) -> str:
    return f"{size:,} bytes"
