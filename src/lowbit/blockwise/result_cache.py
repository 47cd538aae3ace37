"""Products and attention that a block's later passes would compute again are kept while it is calibrated.

The weights of a block are solved in the order in which they are multiplied, and every pass runs the block from its beginning. What it
computes there from weights that have their final values is the same each time, so that in all it is computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from lowbit.blockwise.hidden_states import TensorFile

_FILE_BYTES = 1 << 30  # of results; products beyond them are computed again, attention, which costs more, is kept


class ResultCache:
    """Results by micro-batch and by the order of calls in a forward, in a file.

    A result counts once every watched weight that the forward has multiplied with so far is final: its operands cannot change.
    """

    def __init__(self, folder: Path) -> None:
        self.file = TensorFile(folder)
        self.final: set[str] = set()  # weights that have the values they keep
        self._known: dict[tuple[int, int], int] = {}  # where in the file
        self._batch = self._call = 0
        self._valid = True

    def begin(self, batch: int) -> None:
        """A forward over this micro-batch starts."""
        self._batch, self._call, self._valid = batch, 0, True

    def depends_on(self, name: str) -> None:
        """The forward is about to multiply with this weight."""
        self._valid = self._valid and name in self.final

    @property
    def knows_next(self) -> bool:
        """Whether the next result of this forward is kept, so that nobody needs to look at its operands."""
        return self._valid and (self._batch, self._call) in self._known

    def result(self, compute: Callable[[], Tensor], costly: bool = False) -> Tensor:
        """`compute()`, or what it gave before. `costly`: kept however large the file is."""
        key, known = (self._batch, self._call), self.knows_next
        self._call += 1
        if known:
            return self.file.read(self._known[key])
        found = compute()
        if self._valid and isinstance(found, Tensor) and (costly or self._fits(found)):
            with suppress(OSError):  # a full disk: it is computed again
                self._known[key] = self.file.append(found)
        return found

    def _fits(self, found: Tensor) -> bool:
        return self.file.nbytes + found.numel() * found.element_size() <= _FILE_BYTES

    def forget(self) -> None:
        """The block is done, or its weights changed after all."""
        self.file.rewind()
        self._known.clear()
        self.final.clear()

    def remove(self) -> None:
        """Nothing more will be asked: remove the file."""
        self.forget()
        self.file.remove()
