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
# Bytes for each element of a second moment [K, K] while a weight is solved with it. Gathered: sums and means in float32. Drift: the
# same again. Factorized: the damped matrix in float32, and it and its factor in float64.
_GATHERED, _DRIFT, _FACTORIZED = 8, 8, 20
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
    """Bytes on top of Python and its libraries: the largest of three stages.

    What lies outside the blocks is solved: as stored, in float32 for the first block, and as it became. The first block runs with all that in
    float32. Then each block has its weights as stored and in float32, beside the activations of one micro-batch or, for the weight that
    takes most, the second moments of its input and what solving it takes; embeddings are looked up as they became.
    """
    blocks, outside = blocks_of_tensors(tensors)
    read = [t for t in outside if t.kind != "head"]
    placed = sum(4 * t.count for t in read)
    became = sum(t.bytes_after for t in read)
    stored = max((t.bytes_before for t in read if t.dtype.itemsize != 4), default=0)
    first = _weights(blocks[0]) + _activations(blocks[0]) if blocks else 0
    most = max((_weights(part) + max(_activations(part), _most_solving(part, recipe)) for part in blocks), default=0)
    return became + max(placed + stored, placed + first, most)


def _weights(block: Sequence[TensorPlan]) -> int:
    """A block as stored and in float32, which takes no more where it is stored so."""
    return sum(t.bytes_before + (4 * t.count if t.dtype.itemsize != 4 else 0) for t in block)


def _activations(block: Sequence[TensorPlan]) -> int:
    widest = max((t.stored_shape[-1] for t in block if t.format is not None), default=0)
    return 4 * MICRO_BATCH * widest * _LIVE_WIDTHS


def _most_solving(block: Sequence[TensorPlan], recipe: Recipe) -> int:
    return max((_solving(t, recipe) for t in block if t.format is not None), default=0)


def _solving(t: TensorPlan, recipe: Recipe) -> int:
    """The moments of its input, and the weight at work; of a stack of experts one after another, with the moments of all."""
    width = t.stored_shape[-1]
    experts = t.shape[0] if t.kind == "experts" else 1
    needs = _needs(t.format, recipe)
    gathered = _GATHERED * (experts + (experts > 1)) + (_DRIFT if needs == "drift" else 0)
    factorized = 0 if needs == "nothing" else _FACTORIZED
    return width**2 * (gathered + factorized) + _SOLVING * t.count // experts


def _needs(fmt: Format | None, recipe: Recipe) -> str:
    return "nothing" if fmt is None else recipe.solver_for(fmt, True).method.needs
