"""What a calibrated run needs at its peak, from names and shapes alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowbit.interchange.tensors import TensorPlan

MICRO_BATCH = 1024  # tokens that are run at once
_BLOCK = re.compile(r"^(.*?\.\d+)\.")
_LIVE_WIDTHS = (
    8  # activations of the widest layer that a block holds at once, roughly: inputs, gate, up, product, masks
)


def calibrated_working_bytes(tensors: Sequence[TensorPlan]) -> int:
    """Bytes on top of Python and its libraries: what lies outside the blocks in float32, the largest block as stored and in
    float32, the second moments of its widest input (float32 sums, float64 factors), activations of one micro-batch."""
    blocks: defaultdict[str, list[TensorPlan]] = defaultdict(list)
    outside = 0
    for t in tensors:
        found = _BLOCK.match(t.name)
        if found:
            blocks[found[1]].append(t)
        elif t.kind != "head":
            outside += 4 * t.count
    worst = max((_block_bytes(part) for part in blocks.values()), default=0)
    # An embedding is solved before the first block, next to its float32 copy.
    return outside + max(worst, outside)


def _block_bytes(block: Sequence[TensorPlan]) -> int:
    weights = sum(t.bytes_before + 4 * t.count for t in block)
    widths = [t.stored_shape[-1] for t in block if t.format is not None]
    experts = max((t.shape[0] for t in block if t.kind == "experts"), default=1)
    widest = max(widths, default=0)
    rows = max((t.count // t.stored_shape[-1] for t in block if t.format is not None), default=0)
    moments = widest**2 * (4 * (2 + experts) + 8 * 5)
    activations = 4 * MICRO_BATCH * widest * _LIVE_WIDTHS
    solving = 4 * 6 * widest * rows
    return weights + moments + activations + solving
