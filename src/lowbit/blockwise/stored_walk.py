"""A model run over windows of text block by block with its weights as its files store them: what measuring walks.

Nothing is solved here, so nothing is kept in float32: a float model's matrices stand in the type of the file and are widened where
they are multiplied, a quantized one's stand as codes. Every figure is computed in float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.blockwise.block_runner import model_inputs
from lowbit.blockwise.walk import QUANTIZED, Block, BlockWalk
from lowbit.blockwise.widening import NARROW, Widening
from lowbit.errors import SourceError
from lowbit.formats import QTensor
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorPlan
from lowbit.kernels.cpu import Packed
from lowbit.kernels.heap import trim
from lowbit.nn.packed import PackedWeight

_MATRICES = ("linear", "conv1d", "experts", "embedding", "head")


@dataclass(frozen=True, eq=False)
class Stored:
    """A model in files, and how one of its tensors is read as it is to stand in the model.

    source: of its config and label. tensors: all that the model knows. tied: alias -> name. read: by name.
    """

    source: Source
    tensors: tuple[TensorPlan, ...]
    tied: Mapping[str, str]
    read: Callable[[str], Tensor | PackedWeight]

    @staticmethod
    def of_source(source: Source) -> Stored:
        """A float model by any of its names."""
        params, extra = source.inventory.params, set(source.extra)
        plans = tuple(
            TensorPlan(name, spec.shape, params[name].kind, spec.dtype, params[name].transposed)
            for name, spec in source.tensors.items()
            if name not in extra
        )
        return Stored(source, plans, source.inventory.tied, source.read)

    @staticmethod
    def of_folder(folder: LowbitFolder) -> Stored:
        """A folder that lowbit wrote."""
        source, contents = folder.dense(), folder.contents
        extra = set(source.extra)
        plans = tuple(t for name, t in contents.tensors.items() if name not in extra)

        def read(name: str) -> Tensor | PackedWeight:
            found = folder.read(name)
            if isinstance(found, Tensor):
                return found
            t = contents.tensors[name]
            packed = PackedWeight.of(
                found, transposed=t.transposed, inputs=t.inputs, input_parts=folder.read_inputs(name)
            )
            packed.dispatcher.only = _kernel(found, t)
            return packed

        return Stored(source, plans, contents.tied, read)


def _kernel(q: QTensor, t: TensorPlan) -> str:
    """The kernel that needs the least memory. None is timed, for which each would hold the weight in its own form."""
    ours = Packed()
    declined = ours.declines_inputs(q, t.inputs) or ours.declines(q, torch.float32, torch.device("cpu"))
    return ours.name if declined is None else "expand"


class StoredWalk(BlockWalk):
    """One pass of a model over windows, up to its logits.

    windows: int64 [count, length]. copying: an encoder-decoder reads each window and is to write it again, as in
    `model(input_ids, labels=input_ids)`. folder: of what is kept on the disk while it lasts; where a run before this one was killed,
    the blocks that it finished are not run again.
    """

    def __init__(self, stored: Stored, windows: Tensor, folder: Path, copying: bool = False) -> None:
        super().__init__(stored, stored.source, list(windows), folder, torch.float32, whole=True)
        self.stored, self._copying = stored, copying
        self.module = self._skeleton.module
        self.module.config.dtype = torch.float32
        self._underway: Iterator[Block] | None = None
        self._head: Block | None = None
        for part in self.module.modules():
            # A model takes its own type and device from its first parameter, which may be packed or without memory.
            if hasattr(type(part), "device") and hasattr(type(part), "dtype"):
                part.register_parameter("_computes_in", nn.Parameter(torch.zeros(0), requires_grad=False))

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return len(self.inside)

    @property
    def left(self) -> int:
        """How many of them no run before this one has finished."""
        return self.count - self._first

    def read(self, name: str) -> Any:
        return self.stored.read(name)

    def behind_blocks(self) -> list[str]:
        return []  # they stand in their places, and nobody else looks at them

    def end_shared(self, block: int) -> None:
        self._shared.end(block, None)  # every block reads them as they are stored

    def place(self, name: str, weight: Any) -> None:
        self._place_inside(name, weight)

    def _place_inside(self, name: str, weight: Any) -> None:
        narrow = isinstance(weight, Tensor) and weight.dtype in NARROW and self.tensors[name].kind in _MATRICES
        self._skeleton.place(name, weight, weight.dtype if narrow else torch.float32)

    def computing(self) -> AbstractContextManager[Any]:
        return Widening(self.module.parameters())

    def inputs(self, batch: int) -> dict[str, Any]:
        ids = self.batches[batch]
        given = model_inputs(self.module, ids)
        if not self._copying:
            return given
        del given["decoder_input_ids"]
        shift = getattr(self.module, "prepare_decoder_input_ids_from_labels", None)
        return given | ({"labels": ids} if shift is None else {"decoder_input_ids": shift(labels=ids)})

    def run_blocks(self, on_block: Callable[[], None] = lambda: None, only: frozenset[int] | None = None) -> None:
        """All blocks, one after another; `on_block` is called after each. Then `logits` can be asked for."""
        self.place_outside()
        self._underway = self.blocks(only)
        for block in self._underway:
            if not block.returns:
                self._head = block
                return
            for batch in range(block.batches):
                block.save(batch, block.run(batch))
            trim()
            on_block()

    def logits(self, batch: int, rows: range) -> Tensor:
        """Float [windows of the micro-batch, rows, vocabulary] of these rows of each window, once all blocks are through."""
        assert self._head is not None
        given, whole = self.inputs(batch), len(self.batches[batch][0])
        if self.slices_logits:
            given |= {"logits_to_keep": torch.arange(rows.start, rows.stop)}
        out = self.run(self._head.index, self._head.place_in_model, batch, QUANTIZED, None, given)
        logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] not in (len(rows), whole):
            raise SourceError(
                f"{type(self.module).__name__} gives no logits for every token, so there is nothing to measure: load it with its "
                "language-model head"
            )
        return logits if logits.shape[1] == len(rows) else logits[:, rows.start : rows.stop]

    @property
    def slices_logits(self) -> bool:
        """Whether the model computes the logits of some of the tokens alone."""
        if "logits_to_keep" not in inspect.signature(self.module.forward).parameters:
            return False
        return "labels" not in self.inputs(0)  # the loss wants all of them

    def end(self) -> None:
        """Remove what is kept on the disk, and the weights."""
        if self._underway is not None:
            for _ in self._underway:  # behind its last block the walk clears up
                pass
            self._underway = self._head = None
        self.release()
