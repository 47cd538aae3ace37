"""Weights that several blocks read, such as the one attention of Zamba: they belong to the first of them and stay until the last."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowbit.blockwise.places import BlockPlace
from lowbit.interchange.files.atomic import sync

Place = Callable[[str, "Tensor | None"], None]


class SharedWeights:
    """Which block of `places` each tensor belongs to, and the values that shared ones got there.

    A later block reads these values in the quantized stream, and those of the source in the float one. They are kept in `folder` too, so
    that a run goes on after it was killed.
    """

    def __init__(
        self, places: Sequence[BlockPlace], names: Iterable[str], tied: Mapping[str, str], folder: Path,
        read: Callable[[str], Tensor], place: Place,
    ) -> None:  # fmt: skip
        """`read` gives a tensor of the source, `place` lets the model compute with it, and takes it away with None."""
        self._folder, self._read, self._place = folder, read, place
        every: dict[str, list[str]] = {name: [name] for name in names}
        for alias, name in tied.items():
            if name in every:
                every[name].append(alias)
        self.users: dict[str, list[int]] = {}
        for name, known_as in every.items():
            found = [next((i for i, p in enumerate(places) if p.owns(other)), None) for other in known_as]
            inside = sorted({i for i in found if i is not None})
            # A head that is tied to an embedding lies outside the blocks, and so does what is tied to something there.
            self.users[name] = inside if None not in found else []
        self._final: dict[str, Tensor] = {}
        self._shown: tuple[int, bool] | None = None

    def of(self, block: int) -> list[str]:
        """The tensors that belong to a block, in the order of all."""
        return [name for name, users in self.users.items() if users[:1] == [block]]

    def outside(self) -> list[str]:
        """Those that belong to none."""
        return [name for name, users in self.users.items() if not users]

    def _borrowed(self, block: int) -> list[str]:
        return [name for name, users in self.users.items() if block in users[1:]]

    def show(self, block: int, floats: bool) -> None:
        """Put what block `block` reads of earlier ones in its place, before it is run."""
        if self._shown == (block, floats):
            return
        self._shown = (block, floats)
        for name in self._borrowed(block):
            self._place(name, self._read(name) if floats else self._value(name))

    def end(self, block: int, now: Callable[[str], Tensor] | None) -> None:
        """The block is done: its tensors are gone, but for those that later blocks read. `now`: the values that they have; None where
        these are the source's."""
        lasting = {} if now is None else {name: now(name) for name in self.of(block) if len(self.users[name]) > 1}
        if lasting:
            self._final |= lasting
            path = self._file(block)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: t.detach().contiguous().clone() for name, t in lasting.items()}, path)
            sync(path)
        for name in [*self.of(block), *self._borrowed(block)]:
            if self.users[name][-1] == block:
                self._place(name, None)
                self._final.pop(name, None)
        self._shown = None

    def _value(self, name: str) -> Tensor:
        path = self._file(self.users[name][0])
        if name not in self._final and not path.is_file():
            return self._read(name)  # also where a trial passed over the block that it belongs to
        if name not in self._final:
            with safe_open(path, framework="pt") as file:
                self._final[name] = file.get_tensor(name).clone()
        return self._final[name]

    def _file(self, block: int) -> Path:
        return self._folder / f"shared-{block:05d}.safetensors"
