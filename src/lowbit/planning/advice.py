"""What people should know of a plan before the work: groups that do not divide rows, groups that kernels do not serve, one
scale for a whole row in few bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lowbit.formats import Format
from lowbit.formats.blocks import CHANNEL
from lowbit.interchange.tensors import TensorPlan
from lowbit.recipes.recipe import Recipe

STEP = 16  # columns: the kernels of the engine serve groups that are a multiple of it
_FEW_BITS = 4
_NAMED = 3  # widths that are named


def may_advise(recipe: Recipe) -> bool:
    """Whether `advice` may have anything to say of a recipe, whatever the model is."""
    return recipe.name is None or any(_group(f) % STEP for f in _formats(recipe))


def advice(recipe: Recipe, tensors: Sequence[TensorPlan]) -> tuple[str, ...]:
    """Sentences on what is unusual in how a recipe groups the weights of a model; none for a preset whose groups the kernels serve."""
    if not may_advise(recipe):
        return ()
    widths: dict[Format, dict[int, None]] = {}
    for t in tensors:
        if t.format is not None:
            widths.setdefault(t.format, {})[t.stored_shape[-1]] = None
    every = math.gcd(*(w for found in widths.values() for w in found)) if widths else 0
    groups: dict[int, dict[int, None]] = {}
    for fmt, found in widths.items():
        if (size := _group(fmt)) > 1:
            groups.setdefault(size, {}).update(found)
    said = [_of_group(size, sorted(found), every) for size, found in groups.items()]
    return (*filter(None, said), *_of_rows(recipe, tensors))


def _of_group(size: int, widths: Sequence[int], every: int) -> str:
    """What a group size does on rows of these widths; empty where it divides them all and is served."""
    short = [w for w in widths if w > size and w % size]
    parts = []
    if short:
        last = " or ".join(f"{n:,}" for n in dict.fromkeys(w % size for w in short))
        parts.append(
            f"groups of {size:,} do not divide rows of {_listed(short)}: the last group of each row has only {last} weights, and "
            "nothing is padded"
        )
    wider = [w for w in widths if w < size]
    if wider:
        parts.append(f"groups of {size:,} are wider than rows of {_listed(wider)}, which get one scale each")
    if size % STEP and any(w > size for w in widths):
        parts.append(
            f"lowbit's kernels serve groups that are a multiple of {STEP}, so that weights in groups of {size:,} are expanded to "
            "16 bits in memory when the model runs"
        )
    near = _nearby(size, every)
    if parts and near:
        parts.append(f"{' and '.join(f'g{n}' for n in near)} {'divide' if len(near) > 1 else 'divides'} every row here")
    return "; ".join(parts)


def _of_rows(recipe: Recipe, tensors: Sequence[TensorPlan]) -> list[str]:
    """One scale for a whole row, in so few bits that it costs much."""
    fmt = recipe.format
    used = any(t.format == fmt for t in tensors)
    if (
        not used
        or recipe.name is not None
        or fmt.block != CHANNEL
        or fmt.codebook is not None
        or fmt.grid.bits > _FEW_BITS
    ):
        return []
    return [
        f"{fmt} has one scale for a whole row, which loses much in {fmt.grid.bits} bits; {fmt.grid.name}:g32 has one for 32 "
        "weights and takes half a bit more"
    ]


def _formats(recipe: Recipe) -> list[Format]:
    return [f for f in (recipe.format, recipe.embed, *(f for _, f in recipe.layers)) if f is not None]


def _group(fmt: Format) -> int:
    """Columns that share a scale, 0 for all."""
    return max(0, fmt.block.cols)


def _nearby(size: int, every: int) -> list[int]:
    """The group sizes next to `size`, below and above, that divide `every` and that the kernels serve."""
    fine = [n for n in range(2, every + 1) if every % n == 0]
    fine = [n for n in fine if n % STEP == 0] or [n for n in fine if n >= STEP // 2]
    below, above = [n for n in fine if n < size], [n for n in fine if n > size]
    exact = [size] if size in fine else []
    return exact or [*below[-1:], *above[:1]]


def _listed(widths: Sequence[int]) -> str:
    named = [f"{w:,}" for w in widths[:_NAMED]]
    return " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named) + (
        " and others" if len(widths) > _NAMED else ""
    )
