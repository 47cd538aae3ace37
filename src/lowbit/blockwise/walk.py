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
from torch import Tensor, nn

from lowbit.blockwise.block_runner import BlockRunner, LeaveForward, model_inputs
from lowbit.blockwise.capture import InputCapture, OnInput
from lowbit.blockwise.groups import Pass, find_passes, role_in
from lowbit.blockwise.hidden_states import HiddenStates
from lowbit.blockwise.places import BlockPlace, TextPath
from lowbit.blockwise.precision import products_in
from lowbit.blockwise.result_cache import ResultCache
from lowbit.blockwise.shared_weights import SharedWeights
from lowbit.blockwise.skeleton import Skeleton
from lowbit.blockwise.text_path import TOKENS, made_up_ids, text_path
from lowbit.errors import LowbitError, SourceError
from lowbit.formats import QTensor
from lowbit.interchange.hf.calls import one_line
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
        self.source, self.folder = source, folder
        self.tensors = {t.name: t for t in plan.tensors}
        self.batches = micro_batches(windows)
        self.results = ResultCache(folder)
        self._skeleton = Skeleton(source, plan.tied)
        self.path, self.dtype = _path(self._skeleton.module, _some_ids(source, self.batches), dtype)
        self.weight_dtype = self.dtype if weight_dtype in (None, dtype) else weight_dtype
        self._runner = BlockRunner(self._skeleton.module, self.path)
        self._states = HiddenStates(folder / STATES)
        places = self.path.places
        self._shared = SharedWeights(places, self.tensors, plan.tied, folder / STATES, self.read, self._place_inside)
        self._names = {place: self._shared.of(i) for i, place in enumerate(places)}
        self._outside = self._shared.outside()
        self._read = {plan.tied.get(name, name) for name in self.path.used}
        self.unread = self.path.misses(plan.tensors, plan.tied)  # weights that text does not come to
        self.projections = [n for n in self._outside if self.tensors[n].is_multiplied and n in self._read]
        self._whole = whole or bool(self.projections)
        self._first = next((i + 1 for i in reversed(range(len(places))) if self._states.has(i)), 0)
        self._only: Container[int] | None = None
        self._quantized: dict[str, QTensor] = {}  # outside the blocks
        self._floats_outside = False

    @property
    def inside(self) -> list[tuple[BlockPlace, tuple[str, ...]]]:
        """Every block with the names of its tensors, in the order of the model."""
        return [(place, tuple(names)) for place, names in self._names.items()]

    @property
    def positions(self) -> int | None:
        """The longest window that the model can read; None where nothing limits it."""
        return max_positions(self._runner.reader)

    @property
    def finished(self) -> frozenset[str]:
        """Tensors of the blocks that a run before this one finished, which are not visited again."""
        return frozenset(name for place in self.path.places[: self._first] for name in self._names[place])

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
        tensor = self.tensors[name]
        known = name in self._read or (tensor.kind == "other" and name.startswith(self.path.reader))
        return known and (self._whole or tensor.kind != "head")

    def place(self, name: str, weight: Any) -> None:
        """Let the model compute with these values, in float32."""
        self._skeleton.place(name, weight)

    def _place_inside(self, name: str, weight: Any) -> None:
        """The same with a weight of a block, in the type that its products take, so that none casts it again; None takes it away."""
        multiplied = self.tensors[name].is_multiplied
        self._skeleton.place(name, weight, self.weight_dtype if multiplied else torch.float32)

    def inputs(self, batch: int) -> dict[str, Any]:
        """The arguments of a forward over a micro-batch."""
        return model_inputs(self._runner.reader, self.batches[batch])

    def computing(self) -> AbstractContextManager[Any]:
        """Entered around every forward."""
        return products_in(self.dtype)

    def end_shared(self, block: int) -> None:
        """The block is done; what later ones read of it too keeps the values that it has."""
        self._shared.end(block, self._skeleton.get)

    def place_quantized(self, name: str, q: QTensor) -> None:
        """The same with a quantized tensor, expanded; an embedding is looked up in its stored form. The float stream goes on without."""
        self._quantized[name] = q
        self._place_quantized(name)

    def _place_quantized(self, name: str) -> None:
        q = self._quantized[name]

        def dense() -> Tensor:
            return self.tensors[name].as_module(q.dequantize())

        if self._whole:
            self.place(name, dense())
        else:
            self._skeleton.place_packed(name, q, dense)

    def _show_outside(self, i: int, stream: str) -> None:
        """Where block `i` reads embeddings itself, those of the stream are in their places."""
        floats = stream == FLOAT and i in self.path.looking_up
        if floats == self._floats_outside:
            return
        self._floats_outside = floats
        for name in self._quantized:
            if floats:
                self.place(name, self.read(name))
            else:
                self._place_quantized(name)

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
        places, only = self.path.places, self._only
        for i, place in enumerate(places[self._first :], self._first):
            if only is not None and i not in only:
                continue
            block = Block(self, i, place, self._names[place])
            if (
                i >= max(1, self.path.looked_up)
                and not self._whole
                and only is None
                and not self._skeleton.embeddings_dropped
            ):
                self._skeleton.drop_embeddings(self.path.directly)
            yield block
            self.results.forget()
            self.end_shared(i)
            if place.chain:
                self._states.commit(i, [] if only is not None else self._passed(i))
            block.weights = {}  # a visitor may still hold the block while the next one is read
        if self._whole and places[0].chain:
            yield Block(self, len(places), None, self.behind_blocks())
        self.results.remove()
        self._states.clear()

    def _passed(self, i: int) -> list[int]:
        """Blocks whose outputs are of no use behind block `i`: nobody reads them, and a later one stands for them."""
        last = {place.chain: k for k, place in enumerate(self.path.places[: i + 1])}
        kept = self.path.needed[i + 1] | set(last.values())
        return [k for k in range(i) if k not in kept]

    def behind_blocks(self) -> list[str]:
        """The weights that a visitor of what lies outside the blocks is shown."""
        return self.projections

    def release(self) -> None:
        """Take the weights outside the blocks away. The walk itself lies in circles of references, which the garbage collector may find late."""
        for name in self._outside:
            self._skeleton.place(name, None)

    def close(self) -> None:
        """Wait until the blocks that are finished are on the disk."""
        self._states.wait()

    def run(
        self, i: int, place: BlockPlace | None, batch: int, stream: str, tensors: Mapping[str, Tensor] | None,
        inputs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """See `Block.run`. `inputs`: of the forward, those of the micro-batch when None."""
        self._shared.show(i, stream == FLOAT)
        self._show_outside(i, stream)
        before = self._before(i, stream, batch)
        given = self.inputs(batch) if inputs is None else dict(inputs)
        try:
            with torch.set_grad_enabled(tensors is not None and torch.is_grad_enabled()), self.computing():
                return self._runner.run(place, given, before, tensors)
        except LeaveForward as left:
            return left.value
        except (LowbitError, MemoryError, OSError):
            raise
        except Exception as error:  # somebody else's model
            where = f"{place.name}: " if place is not None and place.name else ""
            said = f"{type(error).__name__}: {one_line(error)}"
            raise SourceError(
                f"{where}{type(self._runner.reader).__name__} cannot be run over this text ({said}); try shorter windows (--length), "
                "or a recipe that needs no text"
            ) from error

    def _before(self, i: int, stream: str, batch: int) -> dict[BlockPlace, Any]:
        """What stands for each block before block `i`: what it returned, where that is read. What the others returned nobody reads, but
        the model's code passes it on, and the last one of their chain has the same shape."""
        only, places, needed = self._only, self.path.places, self.path.needed[i]
        finished = [k for k in range(i) if only is None or k in only]
        last = {places[k].chain: k for k in finished}
        stands = [k if k in needed and k in finished else last[places[k].chain] for k in range(i)]
        found = {k: self._states.load(k, stream, batch) for k in set(stands)}
        return {places[k]: found[j] for k, j in enumerate(stands)}


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
        """Whether it stands for a block; what lies outside the blocks returns the model's own output."""
        return self.place_in_model is not None and bool(self.place_in_model.chain or not self._walk._whole)

    def place(self, name: str, weight: Any) -> None:
        """Let a weight of the block have these values, in the type that its products take, so that none casts it again."""
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
        repeats = self.place_in_model is not None and self.place_in_model.chain
        role = role_in(self._walk._skeleton.module.get_submodule(self.name), self.name) if repeats else None
        return find_passes(watched, lambda: self.run(0), role) if watched else []

    def save(self, batch: int, output: Any, stream: str = QUANTIZED) -> None:
        """Keep what the block returned, for the blocks behind it."""
        if self.place_in_model is not None and self.place_in_model.chain:
            self._walk._states.save(self.index, stream, batch, output)

    def mark_final(self, names: Sequence[str]) -> None:
        """These weights have the values that they keep, so that products and attention which depend on no others are kept."""
        self._walk.results.final.update(names)

    def forget_results(self) -> None:
        """Weights changed after all."""
        self._walk.results.forget()


def _path(model: nn.Module, ids: Tensor, dtype: torch.dtype) -> tuple[TextPath, torch.dtype]:
    """The way of text through a model, and the type in which it can be computed: some models add numbers to scores that only float32 has."""
    try:
        with products_in(dtype):
            return text_path(model, ids), dtype
    except SourceError:
        if dtype == torch.float32:
            raise
        return text_path(model, ids), torch.float32


def _some_ids(source: Source, batches: Sequence[Tensor]) -> Tensor:
    """The first tokens [1, length] of the text, or made-up ones where it has none."""
    first = batches[0][:1, :TOKENS] if batches else torch.zeros(1, 0, dtype=torch.int64)
    return first if first.shape[1] > 3 else made_up_ids(source.config)


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
