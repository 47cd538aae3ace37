"""The calibrated driver: block by block, the errors of earlier blocks included, in the memory of one block.

For each block: its weights are read; the quantized stream runs through it as far as the next input that several
weights share; that input's statistics give the codes of those weights, which take their places; and so on to the
block's end, whose outputs are the next block's inputs. Methods that compare with the float model keep a second
stream that never sees a quantized weight.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import SourceError
from lowbit.interchange.inventory import meta_model
from lowbit.interchange.safetensors_file import bytes_of
from lowbit.interchange.source import Source
from lowbit.pipeline.calibration import Calibration
from lowbit.pipeline.groups import Collector, Group, Wave, find_waves
from lowbit.pipeline.plan import Plan, TensorPlan
from lowbit.pipeline.solve import Solved, check_finite, solve, solve_group
from lowbit.pipeline.stages import LeaveForward, Stage, StagedModel, model_inputs
from lowbit.pipeline.states import InputFile, States
from lowbit.pipeline.tap import Tap
from lowbit.solvers.stats import Stats

MICRO_BATCH = 2048  # tokens that are run at once
FLOAT, QUANT = "float", "quant"


@dataclass(frozen=True)
class Settings:
    """How the streams run. `autocast`: products in bfloat16 (everything else float32), where the machine is fast at it."""

    autocast: bool

    @staticmethod
    def of_this_machine() -> Settings:
        return Settings(bool(torch.cpu._is_avx512_bf16_supported()) or bool(torch.cpu._is_amx_tile_supported()))

    def context(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if self.autocast else nullcontext()


class CalibratedRun:
    """One run of a plan over calibration text: `results()` yields every tensor, solved."""

    def __init__(
        self, plan: Plan, source: Source, calibration: Calibration, folder: Path, settings: Settings,
        flush: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        if source.config is None:
            raise SourceError(f"{source.label} has no transformers config, so that it is not known how it reads text")
        self.plan, self.source, self.settings, self.flush = plan, source, settings, flush
        self.model = _skeleton(source)
        self.staged = StagedModel(self.model)
        self.states = States(folder / "states")
        self.folder = folder
        self.batches = _batches(calibration)
        self.tensors = {t.name: t for t in plan.tensors}
        method = plan.recipe.solver
        self.cross = method is not None and method.method.needs == "cross"
        self.streams = (FLOAT, QUANT) if self.cross else (QUANT,)

    # What is read of the model, and where it goes.

    def results(self) -> Iterator[tuple[Solved, str]]:
        """Every tensor of the plan, solved, with the SHA-256 of its source bytes; resumes after the last whole stage."""
        inside = {t: stage for t in self.tensors for stage in self.staged.stages if stage.name and stage.owns(t)}
        whole = not self.staged.stages[0].name
        outside = [] if whole else [t for t in self.tensors if t not in inside]
        quantized: dict[str, Tensor] = {}
        for name in outside:
            weight = self.source.read(name)
            solved = solve(self.tensors[name], weight, self.plan.recipe)
            yield solved, _digest(weight)
            if self.tensors[name].kind != "head":
                self._place(name, weight)
                q = solved.qtensor()
                if q is not None:
                    quantized[name] = _oriented(q.dequantize(), self.tensors[name])
        start = next((i + 1 for i in reversed(range(len(self.staged.stages))) if self.states.has(i)), 0)
        for i, stage in enumerate(self.staged.stages):
            names = [t for t in self.tensors if stage.owns(t)]
            if i < start:
                for name in names:  # their bytes are in the journal already
                    yield Solved(self.tensors[name], {}, 0.0), ""
                continue
            weights = {name: self.source.read(name) for name in names}
            for name, weight in weights.items():
                self._place(name, weight)
            yield from self._stage(i, stage, weights, quantized)
            self.flush()
            self._commit(i)
            for name in names:
                self._place(name, None)
        self.states.clear()

    def _stage(
        self, i: int, stage: Stage, weights: dict[str, Tensor], skeleton: dict[str, Tensor]
    ) -> Iterator[tuple[Solved, str]]:
        inputs = self._float_stream(i, stage) if self.cross else {}
        for name, value in skeleton.items():  # the float stream has passed where they are read
            self._place(name, value)
        skeleton.clear()
        watched = {n: self.model.get_parameter(n) for n in weights if self._solvable(n)}
        with torch.no_grad():
            waves = find_waves(watched, lambda: self._run(i, stage, 0, QUANT), stage.name or None) if watched else []
        done: dict[str, Solved] = {}
        for wave in waves:
            for group, stats in self._statistics(i, stage, wave, watched, inputs):
                plans = [self.tensors[name] for name in group.members]
                found = solve_group(plans, [weights[name] for name in group.members], self.plan.recipe, stats)
                for solved in found:
                    q = solved.qtensor()
                    if q is not None:
                        self._place(solved.plan.name, _oriented(q.dequantize(), solved.plan))
                    done[solved.plan.name] = solved
        for file in inputs.values():
            file.remove()
        for name, weight in weights.items():
            solved = done.get(name) or replace(
                solve(self.tensors[name], weight, self.plan.recipe),
                note="not used while reading the calibration text" if self._solvable(name) else "",
            )
            yield solved, _digest(weight)
        for batch in range(len(self.batches)):
            self.states.save(i, QUANT, batch, self._run(i, stage, batch, QUANT))

    def _statistics(
        self, i: int, stage: Stage, wave: Wave, watched: dict[str, Tensor], inputs: dict[str, InputFile]
    ) -> Iterator[tuple[Group, Stats | dict[int, Stats] | None]]:
        collector = Collector(wave, self.cross)
        for batch in range(len(self.batches)):
            collector.begin()
            collector.x_float = lambda name, batch=batch: inputs[name].read(batch) if name in inputs else None  # type: ignore[misc]
            with Tap(watched, collector.seen):
                self._run(i, stage, batch, QUANT)
        for group in wave:
            yield group, collector.stats(group)

    def _float_stream(self, i: int, stage: Stage) -> dict[str, InputFile]:
        """Run the float model through the stage; keep the inputs of its weights, and what it returns."""
        files: dict[str, InputFile] = {}
        seen_in_batch: set[Any] = set()
        shared: dict[Any, str] = {}

        def seen(name: str, expert: int | None, x: Tensor) -> None:
            key = (x.data_ptr(), tuple(x.shape), x.stride())
            if expert is not None or name in seen_in_batch:
                return
            seen_in_batch.add(name)
            alive.append(x)
            if shared.setdefault(key, name) == name:
                files.setdefault(name, InputFile(self.folder / f"input-{len(files):04d}")).append(x)

        watched = {n: self.model.get_parameter(n) for n in self.tensors if stage.owns(n) and self._solvable(n)}
        for batch in range(len(self.batches)):
            seen_in_batch.clear()
            shared.clear()
            alive: list[Tensor] = []
            with Tap(watched, seen):
                out = self._run(i, stage, batch, FLOAT)
            self.states.save(i, FLOAT, batch, out)
        return files

    def _run(self, i: int, stage: Stage, batch: int, stream: str) -> Any:
        before = {}
        for j, other in enumerate(self.staged.stages[:i]):
            last = j + 1 == i or self.staged.stages[j + 1].chain != other.chain
            if last:
                before[other.chain] = self.states.load(j, stream, batch)
        try:
            with torch.no_grad(), self.settings.context():
                return self.staged.run(stage, model_inputs(self.model, self.batches[batch]), before)
        except LeaveForward as left:
            return left.value

    def _solvable(self, name: str) -> bool:
        return self.tensors[name].format is not None and self.tensors[name].kind in ("linear", "conv1d", "experts")

    def _commit(self, i: int) -> None:
        self.states.commit(i)
        if i and self.staged.stages[i - 1].chain == self.staged.stages[i].chain:
            self.states.drop(i - 1)

    def _place(self, name: str, value: Tensor | None) -> None:
        """Give a parameter or buffer of the model its values in float32; None takes them away again."""
        path, _, leaf = name.rpartition(".")
        try:
            owner = self.model.get_submodule(path)
        except AttributeError:
            return  # a tensor of the checkpoint that the model does not know
        places = owner._parameters if leaf in owner._parameters else owner._buffers
        old = places.get(leaf)
        if old is None:
            return
        if value is None:
            new: Tensor = torch.empty_like(old, device="meta")
        else:
            new = value.to(torch.float32) if value.is_floating_point() else value
        places[leaf] = nn.Parameter(new, requires_grad=False) if leaf in owner._parameters else new
        for alias, canonical in self.plan.tied.items():
            if canonical == name:
                self._alias(alias, places[leaf])

    def _alias(self, alias: str, value: Any) -> None:
        path, _, leaf = alias.rpartition(".")
        owner = self.model.get_submodule(path)
        places = owner._parameters if leaf in owner._parameters else owner._buffers
        places[leaf] = value


def _skeleton(source: Source) -> nn.Module:
    """The model on the meta device but for what its constructor computes (rotary frequencies), ready to run in float32."""
    model = meta_model(source.config)  # type: ignore[arg-type]
    if hasattr(model, "set_experts_implementation"):
        try:
            model.set_experts_implementation("eager")  # one product an expert, so that each is seen
        except (ValueError, NotImplementedError):
            pass
    for holder in (model.config, model.config.get_text_config()):
        holder.use_cache = False
    _make_computed_buffers(model, source)
    return model


def _make_computed_buffers(model: nn.Module, source: Source) -> None:
    """Buffers that no checkpoint holds, such as rotary frequencies: computed by the model's own initialization."""
    for module in model.modules():
        computed = [k for k in module._non_persistent_buffers_set if (b := module._buffers.get(k)) is not None and b.is_meta]
        if computed:
            for key in computed:
                module._buffers[key] = torch.empty_like(module._buffers[key], device="cpu")  # type: ignore[arg-type]
            model._init_weights(module)  # type: ignore[operator]


def _batches(calibration: Calibration) -> list[Tensor]:
    """Windows of the same length stacked to micro-batches of about MICRO_BATCH tokens, in order."""
    batches: list[list[Tensor]] = []
    for ids in calibration.ids:
        last = batches[-1] if batches else None
        room = last is not None and len(last[0]) == len(ids) and (len(last) + 1) * len(ids) <= max(MICRO_BATCH, len(ids))
        if room and last is not None:
            last.append(ids)
        else:
            batches.append([ids])
    return [torch.stack(batch) for batch in batches]


def _oriented(dense: Tensor, plan: TensorPlan) -> Tensor:
    return dense.transpose(-1, -2).contiguous() if plan.transposed else dense


def _digest(weight: Tensor) -> str:
    return hashlib.sha256(bytes_of(weight)).hexdigest()
