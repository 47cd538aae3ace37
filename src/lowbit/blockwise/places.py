"""The blocks of a model by their places in it, and the way of text through them, as values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lowbit.interchange.tensors import TensorPlan


@dataclass(frozen=True)
class BlockPlace:
    """Block `index` of the chain `chain` (the name of its ModuleList), with the name of the block itself.

    Where nothing repeats, or blocks cannot be told apart, the whole model that reads the text is the one block of an empty chain.
    """

    chain: str
    index: int
    name: str

    def owns(self, tensor: str) -> bool:
        """Whether a tensor lies in this block."""
        return not self.name or tensor.startswith(self.name + ".")


def blocks_of(model: nn.Module) -> list[BlockPlace]:
    """The blocks of every outermost ModuleList that holds matrices, in order; else the model as one. Lists of lists are looked into."""
    found: list[BlockPlace] = []
    taken: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(t + ".") for t in taken):
            continue
        if any(isinstance(block, nn.ModuleList) for block in module):
            continue
        if len(module) and all(any(p.dim() >= 2 for p in block.parameters()) for block in module):
            taken.append(name)
            found += [BlockPlace(name, i, f"{name}.{i}") for i in range(len(module))]
    return found or [BlockPlace("", 0, "")]


@dataclass(frozen=True)
class TextPath:
    """How a model reads text.

    reader     the module whose forward is called, by its name; empty for the model itself
    places     the blocks in the order in which they are called; one of an empty chain, the whole reader, where blocks cannot be told apart
    needed     by the number of a block, and last of the reader's own output: the blocks before it whose outputs are still to be read
    handed     arguments of blocks, by place or name, that are containers into which a block puts what later blocks read
    putting    the blocks that do so
    used       names of the parameters and buffers that an operation read
    looking_up the blocks, by number, that read an embedding other than through the blocks before them
    directly   those of `used` that are read by other operations than a look-up of rows
    """

    reader: str
    places: tuple[BlockPlace, ...]
    needed: tuple[frozenset[int], ...]
    handed: frozenset[int | str] = frozenset()
    putting: frozenset[int] = frozenset()
    used: frozenset[str] = frozenset()
    looking_up: frozenset[int] = frozenset({0})
    directly: frozenset[str] = frozenset()

    @property
    def looked_up(self) -> int:
        """The number of the block from which on no embedding is read, nor by the reader itself."""
        return 1 + max(self.looking_up, default=-1)

    def misses(self, tensors: Iterable[TensorPlan], tied: Mapping[str, str]) -> list[str]:
        """Weights that are multiplied with something, but never with what comes of text: those of what sees or hears."""
        read = {tied.get(name, name) for name in self.used}
        return [
            t.name
            for t in tensors
            if t.is_multiplied and t.name not in read and not any(place.owns(t.name) for place in self.places)
        ]
