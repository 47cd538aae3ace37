"""Whether a block is nearer to what it returned before with its inputs scaled, or without: measured on the calibration text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowbit.blockwise.block_tuner import hidden
from lowbit.blockwise.hidden_states import InputFile

Run = Callable[[int], Any]  # what the block returns for a micro-batch


class OutputReference:
    """Keeps what a block returns with its float weights on the disk, and measures other weights by it.

    Attention, routing and experts are in it as they are computed: a scale that is best for the products of one group may change
    a router's choice, or spoil the weight that takes the division.
    """

    def __init__(self, folder: Path) -> None:
        self.outputs = InputFile(folder, torch.float32)

    def record(self, run: Run, batches: int) -> None:
        """What the block returns now is what is wanted."""
        for batch in range(batches):
            self.outputs.append(hidden(run(batch)))

    def error(self, run: Run, batches: int) -> float:
        """Squared distance of what the block returns now, over the whole text."""
        return sum(
            float((hidden(run(batch)).float() - self.outputs.read(batch)).square().sum(dtype=torch.float64))
            for batch in range(batches)
        )

    def remove(self) -> None:
        """Remove the file."""
        self.outputs.remove()
