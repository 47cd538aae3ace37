"""What attention gave is remembered while a block is calibrated: its weights are solved first, and every later pass
through the block would compute the same again. It is the one expensive product without a weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

REMEMBERED = (F.scaled_dot_product_attention,)


class Remembered:
    """Results by micro-batch and by the order of calls in a forward, in files.

    A result counts once every watched weight that the forward has touched so far is solved: its operands cannot change.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settled: set[str] = set()
        self._known: set[tuple[int, int]] = set()
        self._batch = self._call = 0
        self._final = True

    def begin(self, batch: int) -> None:
        """A forward over this micro-batch starts."""
        self._batch, self._call, self._final = batch, 0, True

    def touched(self, name: str) -> None:
        """The forward has multiplied with this weight."""
        self._final = self._final and name in self.settled

    def result(self, compute: Callable[[], Tensor]) -> Tensor:
        """`compute()`, or what it gave before."""
        key = (self._batch, self._call)
        self._call += 1
        if key in self._known and self._final:
            with safe_open(self._file(*key), framework="pt") as file:
                return file.get_tensor("x").clone()
        found = compute()
        if self._final and isinstance(found, Tensor):
            save_file({"x": found.detach().contiguous()}, self._file(*key))
            self._known.add(key)
        return found

    def forget(self) -> None:
        """The block is done, or its weights changed after all."""
        for key in self._known:
            self._file(*key).unlink(missing_ok=True)
        self._known.clear()
        self.settled.clear()

    def _file(self, batch: int, call: int) -> Path:
        return self.folder / f"attention-{batch:04d}-{call:02d}.safetensors"
