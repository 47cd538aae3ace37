"""Two 4-bit codes to a byte, the first in the high nibble, as bitsandbytes stores nf4 and fp4; lowbit has it low."""

from __future__ import annotations

from torch import Tensor


def swap_nibbles(packed: Tensor) -> Tensor:
    """uint8 bytes with the two halves of each exchanged."""
    return (packed << 4) | (packed >> 4)
