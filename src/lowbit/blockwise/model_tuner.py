"""Tuning of the whole model after everything is solved: the tuner is given tensors and functions, and no file.

The float model is held in memory, and the quantized one is the same module called with other tensors. What was tuned is
saved as one file in the unfinished folder before any of it goes to its place, so that a killed run repeats that part only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call

from lowbit.blockwise.block_runner import model_inputs
from lowbit.blockwise.capture import InputCapture
from lowbit.blockwise.precision import products_in
from lowbit.blockwise.skeleton import Skeleton
from lowbit.calibration.data import Calibration
from lowbit.errors import RecipeError
from lowbit.formats import InputQuantizer, QTensor
from lowbit.interchange.files.atomic import replace_file
from lowbit.interchange.files.folder_writer import FolderWriter
from lowbit.interchange.progress import Progress
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorPlan
from lowbit.planning.plan import Plan
from lowbit.tuning.problem import ModelProblem
from lowbit.tuning.straight_through import straight_through
from lowbit.weights.solve import Solved, with_exponent

_FILE = "tuned.safetensors"
Read = Callable[[str], Tensor]  # a stored tensor by its name in the file


def tune_folder(
    plan: Plan, source: Source, calibration: Calibration, writer: FolderWriter, dtype: torch.dtype, progress: Progress | None
) -> None:  # fmt: skip
    """Tune what `writer` has on the disk, all of it solved; resumes. Nothing when the recipe has no such tuner."""
    if plan.recipe.tuner_of("model") is None:
        return
    writer.flush()
    path = writer.partial / _FILE
    if not path.is_file():
        if any("tuned" in entry for entry in writer.journal.values()):
            return  # all of it was in its place when the file was removed
        exponents = {name: int(entry.get("exponent", 0)) for name, entry in writer.journal.items()}
        changed, facts = tune(plan, source, calibration, writer.read, dtype, progress, exponents)
        fresh = path.with_name(_FILE + ".new")
        save_file(changed, fresh, metadata={"facts": json.dumps(facts, sort_keys=True)})
        replace_file(fresh, path)
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        found = {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118
    for t in plan.tensors:
        mine = {part: found[part] for part in t.stored() if part in found}
        if mine:
            writer.rewrite(t.name, mine, tuned=facts)
    if not found:  # nothing was better: say that it was tried
        writer.rewrite(plan.tensors[0].name, {}, tuned=facts)
    writer.flush()
    path.unlink()


def tune_solved(
    plan: Plan, source: Source, calibration: Calibration, solved: list[tuple[Solved, str]], dtype: torch.dtype,
    progress: Progress | None,
) -> list[tuple[Solved, str]]:  # fmt: skip
    """The same for results in memory."""
    if plan.recipe.tuner_of("model") is None:
        return solved
    stored = {part: tensor for s, _ in solved for part, tensor in s.stored.items()}
    exponents = {s.plan.name: s.exponent for s, _ in solved}
    changed, facts = tune(plan, source, calibration, stored.__getitem__, dtype, progress, exponents)
    out = []
    for i, (s, digest) in enumerate(solved):
        mine = {part: changed[part] for part in s.stored if part in changed}
        if mine or (not changed and i == 0):
            s = replace(s, stored=s.stored | mine, tuned=facts)
        out.append((s, digest))
    return out


def tune(
    plan: Plan, source: Source, calibration: Calibration, read: Read, dtype: torch.dtype, progress: Progress | None,
    exponents: Mapping[str, int],
) -> tuple[dict[str, Tensor], dict[str, Any]]:  # fmt: skip
    """(stored tensors that changed by their names in the file, what the tuner says of its work). `exponents`: of the
    formats, by the name of the weight."""
    call = plan.recipe.tuner_of("model")
    assert call is not None
    total = plan.bytes_before

    def say(done: int, of: int) -> None:
        if progress is not None:
            progress(f"{call.name}, step {done + 1} of {of}", total * done // of, total)

    pair = _Pair(plan, source, read, dtype, exponents)
    problem = pair.problem(calibration.ids, say)
    tuned = call.method.function(problem, **dict(call.options))
    changed: dict[str, Tensor] = dict(tuned.vectors)
    for name, q in tuned.weights.items():
        changed |= {f"{name}.{part}": tensor for part, tensor in q.parts().items()}
    same = {part for part, tensor in changed.items() if torch.equal(tensor, read(part))}
    facts = {"method": str(call), **tuned.facts}
    return {part: t.contiguous() for part, t in changed.items() if part not in same}, facts


class _Pair:
    """The float model and, with other tensors, the quantized one: one module for both."""

    def __init__(
        self, plan: Plan, source: Source, read: Read, dtype: torch.dtype, exponents: Mapping[str, int]
    ) -> None:
        self.plan, self.read, self.dtype, self.exponents = plan, read, dtype, exponents
        self.live = Skeleton(source, plan.tied)
        self.known = [t for t in plan.tensors if t.name not in source.extra]
        for t in self.known:
            self.live.place(t.name, source.read(t.name))
        # Transforms that look at data change tensors that are kept, as they go.
        vectors = {t.name for t in self.known if _is_vector(t)}
        kept = [t for t in self.known if t.format is None and t.name not in vectors and t.dtype.is_floating_point]
        self.others = {t.name: read(t.name).float() for t in kept} if plan.recipe.transforms else {}
        self.rounding = {t.name: _quantizer(t, read) for t in self.known if t.inputs is not None}

    def problem(self, windows: tuple[Tensor, ...], say: Callable[[int, int], None]) -> ModelProblem:
        weights = {t.name: self._qtensor(t) for t in self.known if t.format is not None}
        # Embeddings stay float32: with them the sums between blocks would be in bfloat16 too.
        dtypes = {t.name: self.dtype for t in self.known if t.kind in ("linear", "conv1d", "head")}
        return ModelProblem(
            weights,
            frozenset(t.name for t in self.known if t.transposed),
            {t.name: self.read(t.name) for t in self.known if _is_vector(t)},
            self.teacher,
            self.student,
            windows,
            dtypes,
            say,
        )

    def teacher(self, ids: Tensor) -> Tensor:
        with products_in(self.dtype):
            return _logits(self.live.module(**model_inputs(self.live.module, ids)))

    def student(self, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        module = self.live.module
        watched = {name: tensors[name] for name in self.rounding}
        with products_in(self.dtype), InputCapture(watched, self._rounded):
            return _logits(functional_call(module, {**self.others, **tensors}, (), model_inputs(module, ids)))

    def _rounded(self, name: str, expert: int | None, x: Tensor) -> Tensor:
        """Inputs in few bits; gradients pass as if they were not rounded."""
        quantizer = self.rounding[name]
        with torch.no_grad():
            rounded = quantizer.round(x)
        return straight_through(x if quantizer.divisor is None else quantizer.divide(x).to(x.dtype), rounded)

    def _qtensor(self, t: TensorPlan) -> QTensor:
        assert t.format is not None
        parts = {part: self.read(f"{t.name}.{part}") for part in t.format.parts(t.stored_shape)}
        fmt = with_exponent(t.format, self.exponents.get(t.name, 0))
        assert fmt is not None
        return QTensor.from_parts(fmt, t.stored_shape, parts)


def _is_vector(t: TensorPlan) -> bool:
    return t.format is None and t.keep == "vector" and t.dtype.is_floating_point


def _quantizer(t: TensorPlan, read: Read) -> InputQuantizer:
    assert t.inputs is not None
    return InputQuantizer.of(t.inputs, t.stored_shape[-1], {p: read(f"{t.name}.{p}") for p in t.input_parts()})


def _logits(output: Any) -> Tensor:
    """[tokens, vocabulary] of one sequence."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise RecipeError(
            f"distilling compares next-token distributions, and {type(output).__name__} has none; leave the tuner out"
        )
    return logits[0]
