"""What a calibrated run needs at its peak, from names and shapes alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowbit.formats.format import Format

if TYPE_CHECKING:
    from lowbit.interchange.tensors import TensorPlan
    from lowbit.recipes.recipe import Recipe

MICRO_BATCH = 1024  # tokens that are run at once
_BLOCK = re.compile(r"^(.*?\.\d+)\.")
_LIVE_WIDTHS = (
    8  # activations of the widest layer that a block holds at once, roughly: inputs, gate, up, product, masks
)
# Bytes for each element of a second moment [K, K] while a weight is solved with it. Gathered: sums and means in float32. Factorized: the
# damped matrix in float32, and it and its factor in float64. Drift: the same sums and means again, and one more factor in float64.
_GATHERED, _FACTORIZED, _DRIFT = 8, 20, 12
_SOLVING = 24  # bytes for each element of a weight that is solved: in float32, its target, what it became, codes


def blocks_of_tensors(tensors: Sequence[TensorPlan]) -> tuple[list[list[TensorPlan]], list[TensorPlan]]:
    """(the tensors of each block, those outside all blocks)."""
    blocks: defaultdict[str, list[TensorPlan]] = defaultdict(list)
    outside = []
    for t in tensors:
        found = _BLOCK.match(t.name)
        if found:
            blocks[found[1]].append(t)
        else:
            outside.append(t)
    return list(blocks.values()), outside


def calibrated_working_bytes(tensors: Sequence[TensorPlan], recipe: Recipe) -> int:
    """Bytes on top of Python and its libraries: the larger of two stages.

    First what lies outside the blocks is solved: the largest of it as stored, what it became, and all of it in float32. Then, of one
    block after another: its weights as stored and in float32, the activations of one micro-batch, and for the weight that takes most the second
    moments of its input and what solving it takes; beside the embeddings in float32 and as they became, which the first block reads.
    """
    blocks, outside = blocks_of_tensors(tensors)
    read = [t for t in outside if t.kind != "head"]
    placed = sum(_float32(t) for t in read)
    became = sum(t.bytes_after for t in read)
    largest = max((t.bytes_before for t in read), default=0)
    worst = max((_block_bytes(part, recipe) for part in blocks), default=0)
    return placed + became + max(largest, worst)


def _float32(t: TensorPlan) -> int:
    """Bytes of a tensor in float32 beside it as it is stored; one that is stored so takes no more."""
    return 4 * t.count


def _block_bytes(block: Sequence[TensorPlan], recipe: Recipe) -> int:
    weights = sum(t.bytes_before + (4 * t.count if t.dtype.itemsize != 4 else 0) for t in block)
    solved = [t for t in block if t.format is not None]
    widest = max((t.stored_shape[-1] for t in solved), default=0)
    activations = 4 * MICRO_BATCH * widest * _LIVE_WIDTHS
    return weights + activations + max((_solving(t, recipe) for t in solved), default=0)


def _solving(t: TensorPlan, recipe: Recipe) -> int:
    """The moments of its input, and the weight at work; of a stack of experts one after another, with the moments of all."""
    width = t.stored_shape[-1]
    experts = t.shape[0] if t.kind == "experts" else 1
    needs = _needs(t.format, recipe)
    gathered = (_GATHERED * (experts + (experts > 1))) + (8 if needs == "drift" else 0)
    factorized = 0 if needs == "nothing" else _FACTORIZED + (_DRIFT - 8 if needs == "drift" else 0)
    return width**2 * (gathered + factorized) + _SOLVING * t.count // experts


def _needs(fmt: Format | None, recipe: Recipe) -> str:
    return "nothing" if fmt is None else recipe.solver_for(fmt, True).method.needs
