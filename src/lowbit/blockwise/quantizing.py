"""Quantizes a model block by block over text, the errors of earlier blocks included: a visitor of `BlockWalk`.

For each block the quantized stream runs as far as the next input that several weights share; that input's statistics give
the codes of those weights, which take their places; and so on to the block's end, whose outputs are the next block's
inputs. Methods that compare with the float model keep a second stream that never sees a quantized weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.blockwise.activation_quantizers import ActivationQuantizers
from lowbit.blockwise.block_tuner import BlockTuner
from lowbit.blockwise.capture import InputCapture
from lowbit.blockwise.float_inputs import FloatInputs
from lowbit.blockwise.groups import Collector, Group, Pass
from lowbit.blockwise.rewriter import Rewriter
from lowbit.blockwise.scaling import Scaled, scale_inputs
from lowbit.blockwise.token_weights import TokenWeights
from lowbit.blockwise.walk import Block, BlockWalk
from lowbit.calibration.data import Calibration
from lowbit.formats import QTensor
from lowbit.interchange.files.safetensors_reader import bytes_of
from lowbit.interchange.source import Source
from lowbit.kernels.heap import trim
from lowbit.planning.plan import Plan
from lowbit.solvers.stats import Stats
from lowbit.weights.solve import Solved, solve, solve_group

_UNUSED = "not used while reading the calibration text"


class BlockwiseQuantizer:
    """One run of a plan over calibration text: `results()` yields every tensor, solved, but those that are `finished`.

    `dtype`: in which products are computed. `flush` is called before a block counts as finished. `folder`: of what the run
    keeps on the disk; the same folder, given again after a kill, is gone on with. `on_block` is given the name of each block before it
    is run.
    """

    def __init__(
        self, plan: Plan, source: Source, calibration: Calibration, folder: Path, dtype: torch.dtype,
        flush: Callable[[], None] = lambda: None, on_block: Callable[[str], None] = lambda name: None,
    ) -> None:  # fmt: skip
        self.plan, self.source, self.flush, self.on_block = plan, source, flush, on_block
        # Tuners compute with parameters of float32.
        weight_dtype = dtype if plan.recipe.tuner_of("block") is None else torch.float32
        self.walk = BlockWalk(plan, source, calibration.ids, folder, dtype, weight_dtype)
        self.tensors = self.walk.tensors
        self._unread = frozenset(self.walk.unread)
        self.rewriter = Rewriter.of(source, plan.recipe)
        self.tuner = BlockTuner.of(plan, folder, len(self.walk.batches), dtype)
        self.float_inputs = FloatInputs.of(plan.recipe, folder, self.tuner)
        self.tokens = TokenWeights(None)
        self._outside: dict[str, QTensor] = {}

    @property
    def finished(self) -> frozenset[str]:
        """Tensors that a run before this one has done for good."""
        return self.walk.finished

    def results(self) -> Iterator[tuple[Solved, str]]:
        """Each tensor, solved, with the SHA-256 of its source bytes."""
        try:
            yield from self._solved_outside()
            trim()
            walk, weighting = self.walk, self.plan.recipe.weighting
            names = [t.name for t in self.plan.tensors if t.is_multiplied and t.kind != "experts"]
            self.tokens = TokenWeights.of(weighting, self.source, names, walk.batches, walk.folder, walk.dtype)
            for block in walk.blocks():
                self.on_block(block.name)
                yield from self._block(block)
                self.flush()
            self.tokens.clear()
        finally:  # also where whoever asked goes no further
            self.walk.close()
            if self.float_inputs is not None:
                self.float_inputs.remove()

    def _solved_outside(self) -> Iterator[tuple[Solved, str]]:
        """What lies outside the blocks, but the weights there that text is multiplied with, which come last."""
        activations = ActivationQuantizers(self.plan)
        for name, weight in self.walk.outside():
            if name in self.walk.projections:
                continue
            if name in self._unread:
                solved = self._unseen(name, weight, activations)
            else:
                solved = solve(self.tensors[name], weight, self.plan.recipe)
            yield solved, _digest(weight)
            q = solved.qtensor()
            if q is not None and self.walk.reads(name):
                self._outside[name] = q
            del weight, solved  # an embedding is large

    def _block(self, block: Block) -> Iterator[tuple[Solved, str]]:
        digests = {name: _digest(weight) for name, weight in block.weights.items()}
        tuner = self.tuner if block.returns else None
        if tuner is not None:
            tuner.begin()
        if self.float_inputs is not None:
            self.float_inputs.run(block, tuner)
        for name in list(self._outside):  # the float stream has passed where they are read
            self.walk.place_quantized(name, self._outside.pop(name))
        passes = block.passes()
        scaled = scale_inputs(block, passes, self.plan, self.rewriter)
        activations = ActivationQuantizers(self.plan, scaled.divisors)
        if tuner is not None and not tuner.drift:
            for batch in range(block.batches):
                tuner.record(block.run(batch))
        found: dict[str, Solved] = {}
        for pass_ in passes:
            found |= self._solved_pass(block, pass_, scaled, activations)
        if tuner is not None:
            found = _tuned(block, tuner, found, scaled, activations)
        for name, weight in scaled.weights.items():
            yield found.get(name) or self._unseen(name, weight, activations), digests[name]
        for batch in range(block.batches if block.returns else 0):
            with block.capture(activations.rounding(), cached=batch):
                block.save(batch, block.run(batch))

    def _solved_pass(
        self, block: Block, pass_: Pass, scaled: Scaled, activations: ActivationQuantizers
    ) -> dict[str, Solved]:
        """The weights of a pass, solved with the statistics of their inputs, and put in their places."""
        found: dict[str, Solved] = {}
        for group, stats in self._statistics(block, pass_, scaled, activations):
            activations.fix_ranges(group)
            plans, weights = [self.tensors[n] for n in group.members], [scaled.weights[n] for n in group.members]
            for solved in solve_group(plans, weights, self.plan.recipe, stats):
                dense = solved.dense()
                if dense is not None:
                    block.place(solved.plan.name, dense)
                found[solved.plan.name] = replace(solved, stored=solved.stored | activations.parts(solved.plan.name))
            block.mark_final(group.members)
            del stats
        return found

    def _statistics(
        self, block: Block, pass_: Pass, scaled: Scaled, activations: ActivationQuantizers
    ) -> Iterator[tuple[Group, Stats | dict[int, Stats] | None]]:
        collector = Collector(pass_, self.walk.dtype == torch.bfloat16)
        activations.observe(pass_)
        for batch in range(block.batches):
            x_float = {} if self.float_inputs is None else self.float_inputs.read(collector.first, batch)
            x_float |= {name: x / scaled.scales[name] for name, x in x_float.items() if name in scaled.scales}
            tokens = {name: w for name in collector.first if (w := self.tokens.read(name, batch)) is not None}
            collector.begin(x_float, tokens)
            with block.capture(activations.rounding(collector.on_input), cached=batch):
                block.run(batch)
        trim()
        for group in pass_:
            yield group, collector.stats(group)

    def _unseen(self, name: str, weight: Tensor, activations: ActivationQuantizers) -> Solved:
        """A tensor that is kept, or a weight that no text came to."""
        if not self.tensors[name].is_multiplied:
            return solve(self.tensors[name], weight, self.plan.recipe)
        solved = solve(self.tensors[name], weight, self.plan.recipe, note=_UNUSED)
        return replace(solved, stored=solved.stored | activations.parts_unseen(name))


def _tuned(
    block: Block, tuner: BlockTuner, solved: dict[str, Solved], scaled: Scaled, activations: ActivationQuantizers
) -> dict[str, Solved]:
    """The block's weights after its tuner, put in their places."""

    def run(tensors: Mapping[str, Tensor], batch: int) -> Any:
        with InputCapture(tensors, lambda name, expert, x: activations.rounded_through(name, x)):
            return block.run(batch, tensors=tensors)

    found = tuner.tune(solved, scaled.weights, run) if solved else solved
    for name, new in found.items():
        dense = None if new is solved[name] else new.dense()
        if dense is not None:
            block.place(name, dense)
    block.forget_results()
    tuner.remove()
    return found


def _digest(weight: Tensor) -> str:
    return hashlib.sha256(bytes_of(weight)).hexdigest()
