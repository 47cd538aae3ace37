"""The calibrated driver: block by block, the errors of earlier blocks included, in the memory of one block.

For each block: its weights are read; the quantized stream runs through it as far as the next input that several
weights share; that input's statistics give the codes of those weights, which take their places; and so on to the
block's end, whose outputs are the next block's inputs. Methods that compare with the float model keep a second
stream that never sees a quantized weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.blockwise.activation_quantizers import ActivationQuantizers
from lowbit.blockwise.attention_cache import AttentionCache
from lowbit.blockwise.block_tuner import BlockTuner
from lowbit.blockwise.capture import InputCapture
from lowbit.blockwise.groups import Collector, Group, Pass, find_passes
from lowbit.blockwise.hidden_states import HiddenStates, InputFile
from lowbit.blockwise.judge import BlockJudge
from lowbit.blockwise.precision import Settings
from lowbit.blockwise.rewriter import Rewriter
from lowbit.blockwise.skeleton import Skeleton
from lowbit.blockwise.stages import OUTSIDE, LeaveForward, Saved, Stage, StagedModel, model_inputs
from lowbit.blockwise.token_weights import TokenWeights
from lowbit.calibration.data import Calibration
from lowbit.formats import QTensor
from lowbit.interchange.files.safetensors_reader import bytes_of
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorPlan
from lowbit.kernels.heap import trim
from lowbit.planning.memory import MICRO_BATCH
from lowbit.planning.plan import Plan
from lowbit.solvers.stats import Stats
from lowbit.weights.solve import Solved, solve, solve_group

FLOAT, QUANT = "float", "quant"
STATES = "states"  # the folder of what stages returned
_UNUSED = "not used while reading the calibration text"


class CalibratedRun:
    """One run of a plan over calibration text: `results()` yields every tensor, solved."""

    def __init__(
        self, plan: Plan, source: Source, calibration: Calibration, folder: Path, settings: Settings,
        flush: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.plan, self.source, self.settings, self.flush = plan, source, settings, flush
        self.live = Skeleton(source, plan.tied)
        self.staged = StagedModel(self.live.module)
        self.stages = self.staged.stages
        self.states, self.folder = HiddenStates(folder / STATES), folder
        self.batches = micro_batches(calibration)
        self.tensors = {t.name: t for t in plan.tensors}
        solver = plan.recipe.solver
        self.compares = solver is not None and solver.method.needs == "drift"
        self.rewriter = Rewriter.of(source, plan.recipe)
        self.around: list[str] = []
        self.tokens = TokenWeights(None)
        self.attention = AttentionCache(folder)
        self.tuner = BlockTuner.of(
            plan, folder, len(self.batches), torch.bfloat16 if settings.autocast else torch.float32
        )

    def results(self) -> Iterator[tuple[Solved, str]]:
        """Every tensor of the plan, solved, with the SHA-256 of its source bytes; resumes after the last whole stage."""
        inside = {t for t in self.tensors for stage in self.stages if stage.owns(t)}
        around = [t for t in self.tensors if t not in inside]
        later = self.around = [t for t in around if self._multiplies(t)]  # projections beside the chains
        quantized: dict[str, QTensor] = {}
        for name in around:
            weight = self.source.read(name)
            if name in later:
                self.live.place(name, weight)
                continue
            solved = solve(self.tensors[name], weight, self.plan.recipe)
            yield solved, _digest(weight)
            if self.tensors[name].kind != "head" or later:
                self.live.place(name, weight)
                q = solved.qtensor()
                if q is not None:
                    quantized[name] = q
            del weight, solved  # an embedding is large, and this frame lives as long as the run
        trim()
        multiplied = [t.name for t in self.plan.tensors if self._multiplies(t.name) and t.kind != "experts"]
        weighting = self.plan.recipe.weighting
        self.tokens = TokenWeights.of(weighting, self.source, multiplied, self.batches, self.folder, self.settings)
        begin = next((i + 1 for i in reversed(range(len(self.stages))) if self.states.has(i)), 0)
        for i, stage in enumerate(self.stages):
            names = [t for t in self.tensors if stage.owns(t)]
            if i < begin:
                yield from ((Solved(self.tensors[name], {}, 0.0), "") for name in names)  # in the journal already
                continue
            if i and not later:
                self._drop_embeddings(i, stage, names)
            yield from self._stage(i, stage, {name: self.source.read(name) for name in names}, quantized)
            self.flush()
            self.states.commit(i)
            if i and self.stages[i - 1].chain == stage.chain:
                self.states.drop(i - 1)
            for name in names:
                self.live.place(name, None)
        if later:
            weights = {name: self.source.read(name) for name in later}
            yield from self._stage(len(self.stages), OUTSIDE, weights, quantized)
        self.states.clear()
        self.tokens.clear()

    def _stage(
        self, i: int, stage: Stage, weights: dict[str, Tensor], skeleton: dict[str, QTensor]
    ) -> Iterator[tuple[Solved, str]]:
        digests = {name: _digest(weight) for name, weight in weights.items()}
        for name, weight in weights.items():
            self._place(name, weight)
        tuner = None if stage is OUTSIDE else self.tuner
        if tuner is not None:
            tuner.begin()
        two_streams = self.compares or (self.tuner is not None and self.tuner.drift)
        inputs = self._float_stream(i, stage, weights, tuner) if two_streams else {}
        for name, value in skeleton.items():  # the float stream has passed where they are read
            if self.around:
                self.live.place(name, self._dense(name, value))
            else:
                self.live.place_packed(name, value, partial(self._dense, name, value))
        skeleton.clear()
        stored = ActivationQuantizers(self.plan)
        watched = {n: self.live.get(n) for n in weights if self._multiplies(n)}
        passes: list[Pass] = []
        if watched:
            passes = find_passes(watched, lambda: self._run(i, stage, 0, QUANT), stage.name or None)
        divisors = self._rewrite(i, stage, passes, weights, stored) if self.rewriter is not None else {}
        if tuner is not None and not tuner.drift:
            for batch in range(len(self.batches)):
                tuner.aim(self._run(i, stage, batch, QUANT))
        done: dict[str, Solved] = {}
        for pass_ in passes:
            for group, stats in self._statistics(i, stage, pass_, weights, stored, inputs, divisors):
                stored.settle(group)
                plans = [self.tensors[name] for name in group.members]
                for solved in solve_group(plans, [weights[n] for n in group.members], self.plan.recipe, stats):
                    name, q = solved.plan.name, solved.qtensor()
                    if q is not None:
                        self._place(name, _transposed(q.dequantize(), solved.plan))
                    done[name] = replace(solved, stored=solved.stored | stored.parts(name))
                self.attention.settled.update(group.members)
                del stats
                trim()
        for file in inputs.values():
            file.remove()
        if tuner is not None:
            done = self._tuned(i, stage, tuner, done, weights, stored) if done else done
            self.attention.forget()
            tuner.targets.remove()
        for name, weight in weights.items():
            unused = name not in done and self._multiplies(name)
            solved = done.get(name) or solve(self.tensors[name], weight, self.plan.recipe, note=_UNUSED * unused)
            if unused:
                solved = replace(solved, stored=solved.stored | stored.unseen(name))
            yield solved, digests[name]
        for batch in range(len(self.batches) if stage is not OUTSIDE else 0):
            with self._tap(weights, stored, lambda name, expert, x: None, batch):
                self.states.save(i, QUANT, batch, self._run(i, stage, batch, QUANT))
        self.attention.forget()

    def _tuned(
        self, i: int, stage: Stage, tuner: BlockTuner, done: dict[str, Solved], weights: dict[str, Tensor],
        stored: ActivationQuantizers,
    ) -> dict[str, Solved]:  # fmt: skip
        """The block's weights after its tuner, put in their places."""

        def run(tensors: Mapping[str, Tensor], batch: int) -> Any:
            with InputCapture(tensors, lambda name, expert, x: stored.rounded_through(name, x)):
                return self._run(i, stage, batch, QUANT, dict(tensors))

        found = tuner.tune(done, weights, run)
        for name, solved in found.items():
            q = solved.qtensor()
            if q is not None and solved is not done[name]:
                self._place(name, _transposed(q.dequantize(), solved.plan))
        return found

    def _statistics(
        self, i: int, stage: Stage, pass_: Pass, weights: dict[str, Tensor], stored: ActivationQuantizers,
        inputs: dict[str, InputFile], divisors: dict[str, Tensor],
    ) -> Iterator[tuple[Group, Stats | dict[int, Stats] | None]]:  # fmt: skip
        collector = Collector(pass_, self.settings.autocast)
        stored.observe(pass_)
        for batch in range(len(self.batches)):
            collector.begin({k: f.read(batch) / divisors.get(k, 1.0) for k, f in inputs.items() if collector.wants(k)})
            collector.token_weights = {k: w for k in collector.first if (w := self.tokens.read(k, batch)) is not None}
            with self._tap(weights, stored, collector.seen, batch):
                self._run(i, stage, batch, QUANT)
        trim()
        for group in pass_:
            yield group, collector.stats(group)

    def _rewrite(
        self, i: int, stage: Stage, passes: list[Pass], weights: dict[str, Tensor], stored: ActivationQuantizers
    ) -> dict[str, Tensor]:
        """Scale the inputs of all groups of the block; returns what the input of each group is divided by.

        A group's scale is chosen by the errors of its own products. Where transforms choose, the block as a whole decides
        whether any is kept: by what it returns, each weight rounded to nearest, beside the same without scaling.
        """
        assert self.rewriter is not None
        judge = BlockJudge.of(self.rewriter, self.folder) if stage is not OUTSIDE else None
        before, names = dict(weights), [n for n in weights if self._multiplies(n)]

        def run(batch: int) -> Any:
            with self._tap(weights, stored, lambda name, expert, x: None):
                return self._run(i, stage, batch, QUANT)

        def error() -> float:
            assert judge is not None and self.rewriter is not None
            for name in names:
                self._place(name, self.rewriter.nearest(self.tensors[name], weights[name]))
            found = judge.error(run, len(self.batches))
            for name in names:
                self._place(name, weights[name])
            return found

        plain = 0.0
        if judge is not None:
            judge.aim(run, len(self.batches))
            plain = error()
        everything = [group for pass_ in passes for group in pass_]
        collector = Collector(everything, stop=False)
        for batch in range(len(self.batches)):
            collector.begin({})
            with self._tap(weights, stored, collector.seen):
                self._run(i, stage, batch, QUANT)
        divisors: dict[str, Tensor] = {}
        for group in everything:
            plans, stats = [self.tensors[n] for n in group.members], collector.stats(group)
            if not isinstance(stats, Stats) or plans[0].format is None:
                continue
            divides = all(p.inputs is not None and p.inputs.divisor for p in plans)
            found = self.rewriter.scale(group.members, weights, stats, plans[0].format, plans[0].transposed, divides)
            if found is None:
                continue
            changed, scale = found
            divisors[group.first] = scale
            if divides:
                stored.divide(group, scale)
            for name in changed:
                if changed[name] is not weights[name]:
                    self._place(name, changed[name])
            weights.update(changed)
        if judge is not None and divisors and not error() < plain:
            for name in weights:
                if weights[name] is not before[name]:
                    self._place(name, before[name])
            weights.update(before)
            for group in everything:
                stored.undivide(group)
            divisors.clear()
        if judge is not None:
            judge.close()
        return divisors

    def _float_stream(
        self, i: int, stage: Stage, weights: dict[str, Tensor], tuner: BlockTuner | None
    ) -> dict[str, InputFile]:
        """Run the float model through the stage; keep the inputs of its weights, and what it returns."""
        files: dict[str, InputFile] = {}
        alive: dict[Any, Tensor] = {}

        def seen(name: str, expert: int | None, x: Tensor) -> None:
            key = (x.data_ptr(), tuple(x.shape), x.stride())
            if expert is None and key not in alive:
                alive[key] = x  # until the batch is over, so that no other input gets the same memory
                files.setdefault(name, InputFile(self.folder / f"input-{len(files):04d}")).append(x)

        watched = {n: self.live.get(n) for n in weights if self.compares and self._multiplies(n)}
        for batch in range(len(self.batches)):
            alive.clear()
            with InputCapture(watched, seen):
                out = self._run(i, stage, batch, FLOAT)
            if stage is not OUTSIDE:
                self.states.save(i, FLOAT, batch, out)
            if tuner is not None and tuner.drift:
                tuner.aim(out)
        return files

    def _tap(
        self,
        weights: dict[str, Tensor],
        stored: ActivationQuantizers,
        seen: Callable[..., None],
        batch: int | None = None,
    ) -> InputCapture:
        """Watches the block's weights; what is seen, and computed with, are inputs as they are stored in few bits."""

        def both(name: str, expert: int | None, x: Tensor) -> Tensor | None:
            kept = stored.rounded(name, x)
            seen(name, expert, x if kept is None else kept)
            return kept

        if batch is not None:
            self.attention.begin(batch)
        watched = {n: self.live.get(n) for n in weights if self._multiplies(n)}
        return InputCapture(watched, both, remembered=None if batch is None else self.attention)

    def _place(self, name: str, weight: Tensor) -> None:
        """Put a weight of a block in its place, in the type that its products take, so that none casts it again; tuners
        compute with parameters of float32."""
        half = self.settings.autocast and self.tuner is None and self._multiplies(name)
        self.live.place(name, weight, torch.bfloat16 if half else torch.float32)

    def _dense(self, name: str, q: QTensor) -> Tensor:
        return _transposed(q.dequantize(), self.tensors[name])

    def _drop_embeddings(self, i: int, stage: Stage, names: list[str]) -> None:
        """Free the embeddings where a block in the middle of the last chain does not see them: tried, not assumed."""
        if self.live.embeddings_dropped or stage.index == 0 or stage.chain != self.stages[-1].chain:
            return
        for name in names:
            self.live.place(name, self.source.read(name))
        before = Saved(self._run(i, stage, 0, QUANT)).tensors
        with self.live.without_embeddings():
            after = Saved(self._run(i, stage, 0, QUANT)).tensors
        if all(torch.equal(before[key], after[key]) for key in before):
            self.live.drop_embeddings()

    def _run(self, i: int, stage: Stage, batch: int, stream: str, tensors: dict[str, Tensor] | None = None) -> Any:
        last = {s.chain: j for j, s in enumerate(self.stages[:i])}  # the last finished stage of each chain
        before = {chain: self.states.load(j, stream, batch) for chain, j in last.items()}
        try:
            with torch.set_grad_enabled(tensors is not None and torch.is_grad_enabled()), self.settings.context():
                return self.staged.run(stage, model_inputs(self.live.module, self.batches[batch]), before, tensors)
        except LeaveForward as left:
            return left.value

    def _multiplies(self, name: str) -> bool:
        return self.tensors[name].format is not None and self.tensors[name].kind in ("linear", "conv1d", "experts")


def micro_batches(calibration: Calibration) -> list[Tensor]:
    """Windows of the same length stacked to micro-batches of about MICRO_BATCH tokens, in order."""
    batches: list[list[Tensor]] = []
    for ids in calibration.ids:
        last = batches[-1] if batches else []
        if last and len(last[0]) == len(ids) and (len(last) + 1) * len(ids) <= MICRO_BATCH:
            last.append(ids)
        else:
            batches.append([ids])
    return [torch.stack(batch) for batch in batches]


def _transposed(dense: Tensor, plan: TensorPlan) -> Tensor:
    return dense.transpose(-1, -2).contiguous() if plan.transposed else dense


def _digest(weight: Tensor) -> str:
    return hashlib.sha256(bytes_of(weight)).hexdigest()
