"""What attention gave is remembered while a block is calibrated: its weights are solved first, and every later pass
through the block would compute the same again. It is the one expensive product without a weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from lowbit.blockwise.hidden_states import TensorFile


class AttentionCache:
    """Results by micro-batch and by the order of calls in a forward, in a file.

    A result counts once every watched weight that the forward has touched so far is solved: its operands cannot change.
    """

    def __init__(self, folder: Path) -> None:
        self.file = TensorFile(folder / "attention")
        self.settled: set[str] = set()
        self._known: dict[tuple[int, int], int] = {}  # where in the file
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
            return self.file.read(self._known[key])
        found = compute()
        if self._final and isinstance(found, Tensor):
            self._known[key] = self.file.append(found)
        return found

    def forget(self) -> None:
        """The block is done, or its weights changed after all."""
        self.file.remove()
        self._known.clear()
        self.settled.clear()
