"""One block of each kind of a model over one short window of random tokens: what a run over calibration text does with it, timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowbit.blockwise.activation_quantizers import ActivationQuantizers
from lowbit.blockwise.float_inputs import FloatInputs
from lowbit.blockwise.groups import Collector, Group, Pass
from lowbit.blockwise.text_path import made_up_ids
from lowbit.blockwise.walk import Block, BlockWalk
from lowbit.formats import Format
from lowbit.interchange.hf.running import fast_dtype
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorPlan
from lowbit.pipeline.block_timing import AttentionTime, Clock, Gathered, Watch
from lowbit.pipeline.forecast import (
    BlockRates,
    How,
    Kind,
    SolverRates,
    Stream,
    compares,
    format_of,
    how_of,
    kind_of,
)  # fmt: skip
from lowbit.planning.memory import MICRO_BATCH
from lowbit.planning.plan import Plan
from lowbit.recipes.recipe import Recipe
from lowbit.solvers.stats import Stats
from lowbit.weights.solve import solve_group

_FLOPS = 1 << 35  # of a forward of the largest block
_FEWEST_TOKENS = 32
_KINDS = 4  # kinds of blocks that are tried, the most frequent ones
_WIDTH = 1024  # columns of an input whose statistics are gathered, and of a weight that is solved
_ROWS = 64  # of a weight that is solved, for each thread
_EXPERTS = 2  # of a stack whose statistics are gathered
_TABLE = 1 << 22  # elements of an embedding that is read rather than made up


class BlockRehearsal:
    """Tries the blocks when it is made. LowbitError, or whatever the model raises, where it cannot be run over text.

    names       of all blocks, with those of their tensors
    starting    seconds until the first block has its weights
    kinds       what was measured of each kind of block that was tried
    solvers     the same of each solver, for inputs of a width
    """

    def __init__(self, plan: Plan, source: Source, recipes: Sequence[Recipe], folder: Path, clock: Clock) -> None:
        self._plan, self._recipes, self._clock = plan, [r for r in recipes if r.uses_calibration], clock
        self._tensors = {t.name: t for t in plan.tensors}
        self.kinds: dict[Kind, BlockRates] = {}
        self.solvers: dict[tuple[How, int], SolverRates] = {}
        comparing = next((r for r in self._recipes if compares(r)), None)
        self._float = None if comparing is None else FloatInputs(folder, True)
        start = clock()
        walk = BlockWalk(plan, source, [torch.zeros(1, dtype=torch.int64)], folder, fast_dtype())
        self._half = walk.dtype == torch.bfloat16
        self.names = [(place.name, names) for place, names in walk.inside]
        self._putting = walk.path.putting  # what they leave for others is not made up
        chosen = self._chosen([place.chain for place, _ in walk.inside])
        self._tokens = self._window(walk, chosen)
        walk.batches = [made_up_ids(source.config, self._tokens)]
        for t in plan.tensors:
            if walk.reads(t.name) and not any(t.name in names for _, names in self.names):
                made_up = _made_up(t)
                walk.place(t.name, source.read(t.name) if made_up is None else made_up)
        self.starting = clock() - start
        with torch.no_grad():
            for block in walk.blocks(only=chosen):
                if not block.returns:
                    break
                self._try(block)
        walk.results.remove()
        if self._float is not None:
            self._float.remove()

    def _chosen(self, chains: Sequence[str]) -> frozenset[int]:
        """The first block of every chain, and one of each of the kinds that are most frequent."""
        kinds = [self._kind(name) for name, _ in self.names]
        often = sorted(dict.fromkeys(kinds), key=lambda kind: -kinds.count(kind))[:_KINDS]
        first = {chains.index(chain) for chain in chains} | {kinds.index(kind) for kind in often}
        return frozenset(first | self._putting)

    def _kind(self, name: str) -> Kind:
        names = dict(self.names)[name]
        return kind_of(name, [self._tensors[n] for n in names])

    def _window(self, walk: BlockWalk, chosen: frozenset[int]) -> int:
        """How many tokens are run: as many as a run takes at once, fewer of large blocks."""
        largest = max(sum(self._tensors[n].count for n in self.names[i][1]) for i in chosen)
        most = min(MICRO_BATCH, walk.positions or MICRO_BATCH)
        return max(1, min(most, max(_FEWEST_TOKENS, _FLOPS // (2 * max(1, largest)))))

    def _try(self, block: Block) -> None:
        passes = block.passes()  # also what is done once in a process
        watch = Watch(self._clock)
        with block.capture(_ignored, ()), AttentionTime(watch), watch.of("forward"):
            block.run(0)
        if self._float is not None:
            with watch.of("float"):
                self._float.run(block, None)
        else:
            block.save(0, block.run(0), "float")
        activations = ActivationQuantizers(self._plan)
        gathered = Gathered(self._clock, _WIDTH, _EXPERTS)
        for pass_ in passes:
            self._pass(block, pass_, activations, watch, gathered)
        with watch.of("quantized"), block.capture(activations.rounding(), cached=0):
            block.save(0, block.run(0))
        seconds, n = watch.seconds, self._tokens
        attention = min(seconds["attention"], seconds["forward"])

        def stream(whole: float) -> Stream:
            return Stream(max(0.0, whole - attention) / n, attention / n**2)

        forward = stream(seconds["forward"])
        quantized = stream(seconds["quantized"] - gathered.spent)
        own = block.name + "." if block.name else ""
        self.kinds[self._kind(block.name)] = BlockRates(
            tuple(tuple(name.removeprefix(own) for name in g.members) for pass_ in passes for g in pass_), forward,
            stream(seconds["float"]) if self._float is not None else forward, quantized,
            {drift: gathered.seconds(drift) / n for drift in (False, True)}, gathered.finish,
        )  # fmt: skip

    def _pass(
        self, block: Block, pass_: Pass, activations: ActivationQuantizers, watch: Watch, gathered: Gathered
    ) -> None:
        activations.observe(pass_)
        x_float = {} if self._float is None else self._float.read([g.first for g in pass_], 0)
        gathered.begin(Collector(pass_, self._half), Collector(pass_, self._half), x_float)
        with watch.of("quantized"), block.capture(activations.rounding(gathered.on_input), cached=0):
            block.run(0)
        for group in pass_:
            activations.fix_ranges(group)
            experts = max(
                (self._tensors[n].shape[0] for n in group.members if len(self._tensors[n].shape) > 2), default=1
            )
            stats = gathered.stats(group, experts)
            if stats is not None:
                self._solve(block, group, stats)
        block.mark_final([name for group in pass_ for name in group.members])

    def _solve(self, block: Block, group: Group, stats: Stats) -> None:
        for recipe in self._recipes:
            for name in group.members:
                tensor = self._tensors[name]
                fmt = format_of(tensor, recipe)
                if fmt is None:
                    continue
                how, width = how_of(recipe, fmt, True), tensor.out_in[-1]
                known = width if width <= _WIDTH else _WIDTH
                if any(other == how and rates.width == known for (other, _), rates in self.solvers.items()):
                    continue
                rows = tensor.as_rows(block.weights[name]).reshape(-1, *tensor.out_in[-2:])[0]
                self.solvers[how, width] = self._solving(rows, fmt, recipe, stats, known, width > _WIDTH)

    def _solving(
        self, weight: Tensor, fmt: Format, recipe: Recipe, stats: Stats, width: int, wider: bool
    ) -> SolverRates:
        """By few rows and by more, with what statistics are factorized to at hand; of a wide weight also by fewer columns."""
        few = _ROWS * torch.get_num_threads()

        def seconds(rows: int, columns: int, stats: Stats) -> float:
            part = weight[:rows, :columns]
            part = part.repeat(-(-rows // len(part)), 1)[:rows].contiguous()
            piece = TensorPlan("trial", tuple(part.shape), "linear", part.dtype, False, fmt)
            start = self._clock()
            for solved in solve_group([piece], [part], recipe, stats):
                solved.dense()
            return self._clock() - start

        def rates(columns: int) -> tuple[float, float]:
            own = _narrow(stats, columns)
            first = seconds(few, columns, own)
            again, more = seconds(few, columns, own), seconds(3 * few, columns, own)
            row = max((more - again) / (2 * few), more / (30 * few))
            return max(0.0, first - row * few), row

        once, row = rates(width)
        if not wider:
            return SolverRates(width, once, row)
        once_half, row_half = rates(width // 2)
        # row = a K + b K^2, and row_half = a K / 2 + b K^2 / 4; once = c K^2 + d K^3, and once_half = c K^2 / 4 + d K^3 / 8
        squared = 2 * (row - 2 * row_half) / row if row else 1.0
        if recipe.solver_for(fmt, True).method.needs != "nothing":
            squared = 1.0  # and more, as matrices of wide inputs do not fit into caches: the trial does not show it
        cubed = 2 * (once - 4 * once_half) / once if once else 1.0
        return SolverRates(width, once, row, min(1.0, max(0.0, squared)), min(1.0, max(0.0, cubed)))


def _narrow(stats: Stats, width: int) -> Stats:
    """The statistics of the first columns, with nothing factorized yet."""
    drift = None if stats.drift is None else stats.drift[:width, :width].contiguous()
    moment = stats.second_moment[:width, :width].contiguous()
    return Stats(stats.tokens, moment, stats.absmax[:width], stats.mean_abs[:width], drift)


def _made_up(tensor: TensorPlan) -> Tensor | None:
    """Values that a large embedding is looked up in: rows of one short sequence of random numbers, each begun one further on."""
    if tensor.kind != "embedding" or tensor.count < _TABLE:
        return None
    rows, width = tensor.shape
    values = torch.randn(rows + width, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    return values.as_strided((rows, width), (1, 1))


def _ignored(name: str, expert: int | None, x: Tensor) -> None:
    """Inputs that nobody looks at."""
