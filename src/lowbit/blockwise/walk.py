"""A model run block by block over text, in the memory of one block: the walk owns the model, and visitors look at its blocks.

    walk = BlockWalk(plan, source, windows, folder, dtype)
    walk.place_outside()
    for block in walk.blocks():
        for batch in range(block.batches):
            with block.capture(on_input):
                block.save(batch, block.run(batch))

A visitor decides what happens to the weights of a block, and saves what the block returns, in one stream or two: in the
quantized one every block gets what blocks with quantized weights returned, in the float one nothing is quantized. The walk
reads a block's weights and puts them in place, keeps what was saved on the disk, takes the weights away again, and goes on
behind the last block that was finished when a run before this one was killed.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lowbit.blockwise.block_runner import BlockPlace, BlockRunner, LeaveForward, Saved, model_inputs
from lowbit.blockwise.capture import InputCapture, OnInput
from lowbit.blockwise.groups import Pass, find_passes
from lowbit.blockwise.hidden_states import HiddenStates
from lowbit.blockwise.precision import products_in
from lowbit.blockwise.result_cache import ResultCache
from lowbit.blockwise.skeleton import Skeleton
from lowbit.formats import QTensor
from lowbit.interchange.hf.running import max_positions
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorPlan
from lowbit.planning.memory import MICRO_BATCH

FLOAT, QUANTIZED = "float", "quant"  # streams, by the names of their files
STATES = "states"  # the folder of what blocks returned


class Laid(Protocol):
    """What a walk asks of a plan: every tensor, and which names share one (alias -> name)."""

    @property
    def tensors(self) -> Sequence[TensorPlan]: ...
    @property
    def tied(self) -> Mapping[str, str]: ...


class BlockWalk:
    """One pass over the blocks of a model.

    plan            of the model, or what else says which tensors there are
    windows         int64 [length] each: token ids
    folder          of what is kept on the disk while it lasts
    dtype           in which products are computed, see `precision`
    weight_dtype    in which weights that are multiplied stand in their places; `dtype` unless gradients pass through them
    whole           whether the model's own output is wanted too: a last block then stands for what lies outside the others
    """

    def __init__(
        self, plan: Laid, source: Source, windows: Sequence[Tensor], folder: Path, dtype: torch.dtype,
        weight_dtype: torch.dtype | None = None, whole: bool = False,
    ) -> None:  # fmt: skip
        self.source, self.folder, self.dtype = source, folder, dtype
        self.weight_dtype = weight_dtype or dtype
        self.tensors = {t.name: t for t in plan.tensors}
        self.batches = micro_batches(windows)
        self.results = ResultCache(folder)
        self._skeleton = Skeleton(source, plan.tied)
        self._runner = BlockRunner(self._skeleton.module)
        self._states = HiddenStates(folder / STATES)
        places = self._runner.places
        self._names = {place: [name for name in self.tensors if place.owns(name)] for place in places}
        inside = {name for names in self._names.values() for name in names}
        self._outside = [name for name in self.tensors if name not in inside]
        self.projections = [name for name in self._outside if self.tensors[name].is_multiplied]
        self._whole = whole or bool(self.projections)
        self._first = next((i + 1 for i in reversed(range(len(places))) if self._states.has(i)), 0)
        self._only: Container[int] | None = None

    @property
    def inside(self) -> list[tuple[BlockPlace, tuple[str, ...]]]:
        """Every block with the names of its tensors, in the order of the model."""
        return [(place, tuple(names)) for place, names in self._names.items()]

    @property
    def positions(self) -> int | None:
        """The longest window that the model can read; None where nothing limits it."""
        return max_positions(self._skeleton.module)

    @property
    def finished(self) -> frozenset[str]:
        """Tensors of the blocks that a run before this one finished, which are not visited again."""
        return frozenset(name for place in self._runner.places[: self._first] for name in self._names[place])

    def outside(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors outside the blocks with their values, each put in its place as soon as the next is asked for."""
        for name in self._outside:
            weight = self.read(name)
            yield name, weight
            if self.reads(name):
                self.place(name, weight)
            del weight  # an embedding is large, and this frame may live long

    def place_outside(self) -> None:
        """Put the tensors outside the blocks in their places."""
        for name in filter(self.reads, self._outside):
            self.place(name, self.read(name))

    def read(self, name: str) -> Any:
        """The values of a tensor as the source stores them."""
        return self.source.read(name)

    def reads(self, name: str) -> bool:
        """Whether the walk runs what reads this tensor; heads come after the last block."""
        return self._whole or self.tensors[name].kind != "head"

    def place(self, name: str, weight: Any) -> None:
        """Let the model compute with these values, in float32."""
        self._skeleton.place(name, weight)

    def _place_inside(self, name: str, weight: Any) -> None:
        """The same with a weight of a block, in the type that its products take, so that none casts it again."""
        multiplied = self.tensors[name].is_multiplied
        self._skeleton.place(name, weight, self.weight_dtype if multiplied else torch.float32)

    def inputs(self, batch: int) -> dict[str, Any]:
        """The arguments of a forward over a micro-batch."""
        return model_inputs(self._skeleton.module, self.batches[batch])

    def computing(self) -> AbstractContextManager[Any]:
        """Entered around every forward."""
        return products_in(self.dtype)

    def place_quantized(self, name: str, q: QTensor) -> None:
        """The same with a quantized tensor, expanded; an embedding is looked up in its stored form."""

        def dense() -> Tensor:
            return self.tensors[name].as_module(q.dequantize())

        if self._whole:
            self.place(name, dense())
        else:
            self._skeleton.place_packed(name, q, dense)

    def blocks(self, only: Container[int] | None = None) -> Iterator[Block]:
        """The blocks that are not finished, in the order of the model, each with its weights in place.

        When the next is asked for, what was saved of a block counts as soon as it is on the disk, for which nobody waits, and its
        weights are gone. The last one may stand for what lies outside the others (`Block.returns` is false).

        `only`: the numbers of those that are visited, among them the first of every chain. What one of them returned then stands for
        what the blocks between it and the next would have made of it: for trials that look at how blocks run, not at what they say.
        """
        self._only = only
        try:
            yield from self._blocks()
        finally:
            self.close()

    def _blocks(self) -> Iterator[Block]:
        places, only = self._runner.places, self._only
        for i, place in enumerate(places[self._first :], self._first):
            if only is not None and i not in only:
                continue
            block = Block(self, i, place, self._names[place])
            if i and not self._whole and only is None:
                self._drop_embeddings(block)
            yield block
            self.results.forget()
            replaced = only is None and i > 0 and places[i - 1].chain == place.chain
            self._states.commit(i, instead_of=i - 1 if replaced else None)
            for name in self._names[place]:
                self._skeleton.place(name, None)
            block.weights = {}  # a visitor may still hold the block while the next one is read
        if self._whole:
            yield Block(self, len(places), None, self.projections)
        self.results.remove()
        self._states.clear()

    def close(self) -> None:
        """Wait until the blocks that are finished are on the disk."""
        self._states.wait()

    def run(
        self, i: int, place: BlockPlace | None, batch: int, stream: str, tensors: Mapping[str, Tensor] | None,
        inputs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """See `Block.run`. `inputs`: of the forward, those of the micro-batch when None."""
        only, places = self._only, self._runner.places[:i]
        finished = [(j, other) for j, other in enumerate(places) if only is None or j in only]
        last = {other.chain: j for j, other in finished}  # of each chain
        before = {chain: self._states.load(j, stream, batch) for chain, j in last.items()}
        given = self.inputs(batch) if inputs is None else dict(inputs)
        try:
            with torch.set_grad_enabled(tensors is not None and torch.is_grad_enabled()), self.computing():
                return self._runner.run(place, given, before, tensors)
        except LeaveForward as left:
            return left.value

    def _drop_embeddings(self, block: Block) -> None:
        """Free the embeddings where a block in the middle of the last chain does not see them: tried, not assumed."""
        place, skeleton = block.place_in_model, self._skeleton
        if place is None or skeleton.embeddings_dropped or not place.index:
            return
        if place.chain != self._runner.places[-1].chain:
            return
        before = Saved(block.run(0)).tensors
        with skeleton.without_embeddings():
            after = Saved(block.run(0)).tensors
        if all(torch.equal(before[key], after[key]) for key in before):
            skeleton.drop_embeddings()


class Block:
    """One block of a walk while its weights are in place. `weights`: as the source stores them."""

    def __init__(self, walk: BlockWalk, index: int, place: BlockPlace | None, names: Sequence[str]) -> None:
        self.place_in_model, self.batches, self.folder = place, len(walk.batches), walk.folder
        self._walk, self.index = walk, index
        self.weights = {name: walk.read(name) for name in names}
        self.multiplied = [name for name in names if walk.tensors[name].is_multiplied]
        for name, weight in self.weights.items():
            self.place(name, weight)

    @property
    def name(self) -> str:
        """As the model names it; empty for the whole model, and for what lies outside the blocks."""
        return "" if self.place_in_model is None else self.place_in_model.name

    @property
    def returns(self) -> bool:
        """Whether other blocks read what it returns; what lies outside the blocks returns the model's own output."""
        return self.place_in_model is not None

    def place(self, name: str, weight: Any) -> None:
        """Let a weight of the block have these values."""
        self._walk._place_inside(name, weight)

    def run(self, batch: int, stream: str = QUANTIZED, tensors: Mapping[str, Tensor] | None = None) -> Any:
        """What the block returns for a micro-batch. `tensors` stand in the places of weights, and have gradients."""
        return self._walk.run(self.index, self.place_in_model, batch, stream, tensors)

    def capture(self, on_input: OnInput, names: Sequence[str] | None = None, cached: int | None = None) -> InputCapture:
        """Enter it around `run`: `on_input` sees the inputs of these weights (None: of all that are multiplied).

        `cached`: the micro-batch that is run, whose products and attention may come from the cache and are kept there.
        """
        watched = {name: self._walk._skeleton.get(name) for name in (self.multiplied if names is None else names)}
        if cached is None:
            return InputCapture(watched, on_input)
        self._walk.results.begin(cached)
        return InputCapture(watched, on_input, results=self._walk.results)

    def passes(self) -> list[Pass]:
        """Its weights in the order in which they are multiplied, see `find_passes`."""
        watched = {name: self._walk._skeleton.get(name) for name in self.multiplied}
        return find_passes(watched, lambda: self.run(0), self.name or None) if watched else []

    def save(self, batch: int, output: Any, stream: str = QUANTIZED) -> None:
        """Keep what the block returned, for the blocks behind it."""
        if self.returns:
            self._walk._states.save(self.index, stream, batch, output)

    def mark_final(self, names: Sequence[str]) -> None:
        """These weights have the values that they keep, so that products and attention which depend on no others are kept."""
        self._walk.results.final.update(names)

    def forget_results(self) -> None:
        """Weights changed after all."""
        self._walk.results.forget()


def micro_batches(windows: Sequence[Tensor]) -> list[Tensor]:
    """Windows of the same length stacked to micro-batches of about MICRO_BATCH tokens, in order."""
    batches: list[list[Tensor]] = []
    for ids in windows:
        last = batches[-1] if batches else []
        if last and len(last[0]) == len(ids) and (len(last) + 1) * len(ids) <= MICRO_BATCH:
            last.append(ids)
        else:
            batches.append([ids])
    return [torch.stack(batch) for batch in batches]
