"""What attention gave is kept while a block is calibrated: the weights before it are solved first, and every later pass
through the block would compute the same again. It is the one expensive product without a weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from lowbit.blockwise.hidden_states import TensorFile


class AttentionCache:
    """Results by micro-batch and by the order of calls in a forward, in a file.

    A result counts once every watched weight that the forward has multiplied with so far is final: its operands cannot change.
    """

    def __init__(self, folder: Path) -> None:
        self.file = TensorFile(folder / "attention")
        self.final: set[str] = set()  # weights that have the values they keep
        self._known: dict[tuple[int, int], int] = {}  # where in the file
        self._batch = self._call = 0
        self._valid = True

    def begin(self, batch: int) -> None:
        """A forward over this micro-batch starts."""
        self._batch, self._call, self._valid = batch, 0, True

    def depends_on(self, name: str) -> None:
        """The forward has multiplied with this weight."""
        self._valid = self._valid and name in self.final

    def result(self, compute: Callable[[], Tensor]) -> Tensor:
        """`compute()`, or what it gave before."""
        key = (self._batch, self._call)
        self._call += 1
        if key in self._known and self._valid:
            return self.file.read(self._known[key])
        found = compute()
        if self._valid and isinstance(found, Tensor):
            self._known[key] = self.file.append(found)
        return found

    def clear(self) -> None:
        """The block is done, or its weights changed after all."""
        self.file.remove()
        self._known.clear()
        self.final.clear()
