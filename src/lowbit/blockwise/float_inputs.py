"""The float model's own inputs of a block's weights, for methods that compare with them: a second stream beside the quantized
one, kept on the disk while the block is worked on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.blockwise.block_tuner import BlockTuner
from lowbit.blockwise.hidden_states import InputFile
from lowbit.blockwise.walk import FLOAT, Block
from lowbit.recipes.recipe import Recipe


class FloatInputs:
    """Files of inputs by the first of the weights that share one."""

    def __init__(self, folder: Path, compared: bool) -> None:
        """`compared`: whether inputs are kept at all, or only what blocks return."""
        self.folder, self.compared = folder, compared
        self.files: dict[str, InputFile] = {}
        self._free: list[InputFile] = []  # of earlier blocks

    @staticmethod
    def of(recipe: Recipe, folder: Path, tuner: BlockTuner | None) -> FloatInputs | None:
        """None where neither the recipe's solver nor its tuner compares with the float model."""
        compared = recipe.solver is not None and recipe.solver.method.needs == "drift"
        return FloatInputs(folder, compared) if compared or (tuner is not None and tuner.drift) else None

    def run(self, block: Block, tuner: BlockTuner | None) -> None:
        """Run the float stream through the block: keep the inputs of its weights, and what it returns."""
        self.forget()
        alive: dict[Any, Tensor] = {}

        def on_input(name: str, expert: int | None, x: Tensor) -> None:
            key = (x.data_ptr(), tuple(x.shape), x.stride())
            if expert is None and key not in alive:
                alive[key] = x  # until the batch is over, so that no other input gets the same memory
                if name not in self.files:
                    self.files[name] = self._free.pop() if self._free else InputFile(self.folder)
                self.files[name].append(x)

        for batch in range(block.batches):
            alive.clear()
            with block.capture(on_input, None if self.compared else ()):
                out = block.run(batch, FLOAT)
            block.save(batch, out, FLOAT)
            if tuner is not None and tuner.drift:
                tuner.record(out)

    def read(self, names: Iterable[str], batch: int) -> dict[str, Tensor]:
        """[tokens, K] of a micro-batch, of those of the weights whose inputs are kept."""
        return {name: self.files[name].read(batch) for name in names if name in self.files}

    def forget(self) -> None:
        """The block is done: what is kept of the next takes its place."""
        self._free += self.files.values()
        for file in self._free:
            file.rewind()
        self.files = {}

    def remove(self) -> None:
        """Remove the files."""
        self.forget()
        for file in self._free:
            file.remove()
