"""What people call: quantize, plan, load."""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.blockwise.model_tuner import tune_solved
from lowbit.blockwise.precision import Settings
from lowbit.blockwise.range_survey import judged, recalled, survey, with_survey
from lowbit.blockwise.run import CalibratedRun
from lowbit.calibration.data import LENGTH, SAMPLES, Calibration, load_calibration
from lowbit.errors import OutputError, RecipeError, SourceError, WeightError
from lowbit.formats import Format, QTensor
from lowbit.interchange.files.claim import claimed
from lowbit.interchange.files.folder_writer import check_apart, head_of, replace_folder
from lowbit.interchange.opening import open_headers, open_source
from lowbit.interchange.progress import Progress
from lowbit.interchange.source import Source
from lowbit.nn.packed import PackedWeight
from lowbit.nn.swap import swap
from lowbit.pipeline.driver import (
    OnLayer,
    Report,
    fingerprint,
    make_report,
    quantization_config,
    reported,
    solved_facts,
    solved_tensors,
    write_folder,
)
from lowbit.pipeline.loading import load
from lowbit.planning.plan import MAX_SHARD, Plan, make_plan
from lowbit.recipes.recipe import Recipe
from lowbit.recipes.rewriting import rewritten
from lowbit.solvers.ranging import in_range
from lowbit.weights.finite import check_finite, check_source
from lowbit.weights.solve import Solved


class Quantized:
    """A quantized model: `plan`, `report`, `model` (packed, ready to run), `save(folder)`."""

    def __init__(self, plan: Plan, report: Report, source: Source) -> None:
        self.plan, self.report, self.source = plan, report, source
        self.folder: Path | None = None
        self._model: nn.Module | None = None
        self._solved: list[tuple[Solved, str]] = []

    @property
    def model(self) -> nn.Module:
        """The model with packed weights, loaded when first asked for."""
        if self._model is None:
            self._model = load(_required(self.folder))
        return self._model

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the model folder `out`. OutputError when it is not empty and `overwrite` is not set."""
        if self._solved:
            with claimed(out):
                write_folder(self.plan, self.source, out, solved=iter(self._solved), overwrite=overwrite, again=False)
            return Path(out)
        folder, out = _required(self.folder), Path(out)
        if out.resolve() == folder.resolve():
            return out
        if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(f"{out} is not empty; give another folder, or overwrite=True to replace it")
        check_apart(folder, out)
        fresh = out.resolve().with_name(f".{out.resolve().name}.lowbit-saving")
        try:
            with claimed(out):
                try:
                    shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed
                    shutil.copytree(folder, fresh)
                    replace_folder(fresh, out.resolve())
                finally:
                    shutil.rmtree(fresh, ignore_errors=True)
        except OSError as error:
            raise OutputError(
                f"cannot write {out}: {error.strerror or error}; check the path and its rights"
            ) from error
        return out

    def __repr__(self) -> str:
        return f"Quantized({self.plan.label}, {self.report})"


def quantize(
    model: str | Path | nn.Module,
    recipe: str | Format | Recipe = "w4",
    out: str | Path | None = None,
    *,
    tokenizer: Any = None,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    calibration: Any = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    chat: bool = False,
    on_layer: OnLayer | None = None,
) -> Quantized:
    """Quantize a model: a Hugging Face id, a folder, a .gguf file, `smollm2`, or a module in memory.

    With `out` (and always for names) the work goes tensor by tensor from file to file; without `out` a name
    goes to a temporary folder that lives as long as the result. A module is not changed: the result's `model` is a
    copy that shares what was kept. `progress(name, bytes done, bytes in all)`.

    `calibration`: text for methods that look at data: a file, a list of strings, a dataset id, token ids, a
    DataLoader, or "self" for text that the model writes itself, which recipes that need data take when none is
    given. `samples` windows of `length` tokens; `chat` wraps documents in the model's chat template. `on_layer(solved)`
    sees each tensor with its errors when it is done.
    """
    wanted = Recipe.of(recipe)
    if calibration is not None:
        wanted = wanted.calibrated()
        if not wanted.uses_calibration:
            raise RecipeError(f"{wanted.title} does not look at calibration text; leave calibration out")
    elif wanted.needs_calibration is not None:
        calibration = "self"
    _check_device(device)
    if out is not None and not isinstance(model, nn.Module):
        check_apart(Path(model), Path(out))
    with claimed(out) if out is not None else nullcontext():
        return _quantized(
            model, wanted, out, tokenizer, progress, max_shard_bytes, overwrite, device, calibration, samples, length, chat,
            on_layer,
        )  # fmt: skip


def _quantized(
    model: str | Path | nn.Module, wanted: Recipe, out: str | Path | None, tokenizer: Any, progress: Progress | None,
    max_shard_bytes: int, overwrite: bool, device: torch.device | str, calibration: Any, samples: int, length: int,
    chat: bool, on_layer: OnLayer | None,
) -> Quantized:  # fmt: skip
    """`quantize` by a recipe that is ready, onto an output that nobody else writes."""
    given = open_source(model, tokenizer=tokenizer)
    source = rewritten(given, wanted)
    plan = make_plan(source, wanted, max_shard_bytes=max_shard_bytes)
    if not any(t.format is not None for t in plan.tensors):
        raise RecipeError(f"nothing in {source.label} can be quantized by {wanted}: every tensor is kept")
    text = None
    if calibration is not None:
        if str(device) != "cpu":
            raise RecipeError("calibrated methods run on the CPU in this version; leave device out")
        check_source(given, wanted)
        tok = None if _has_ids(calibration) else source.tokenizer()
        text = load_calibration(calibration, tok, source, samples=samples, length=length, chat=chat)
        plan = _surveyed(plan, source, text, None if out is None else head_of(out), progress)
    if isinstance(model, nn.Module) and out is None:
        return _in_memory(model, source, plan, progress, device, text, on_layer)
    if out is None:
        room = Path(tempfile.mkdtemp(prefix="lowbit-"))
        try:
            report = write_folder(
                plan, source, room / "model", progress=progress, device=device, calibration=text,
                on_layer=on_layer,
            )  # fmt: skip
        except BaseException:
            shutil.rmtree(room, ignore_errors=True)
            raise
        result = Quantized(plan, report, source)
        weakref.finalize(result, shutil.rmtree, room, ignore_errors=True)
        result.folder = room / "model"
        return result
    report = write_folder(
        plan, source, out, progress=progress, overwrite=overwrite, device=device, calibration=text,
        on_layer=on_layer,
    )  # fmt: skip
    result = Quantized(plan, report, source)
    result.folder = Path(out)
    return result


def _surveyed(
    plan: Plan, source: Source, text: Calibration, head: dict[str, Any] | None, progress: Progress | None
) -> Plan:
    """The plan after its static ranges were looked at; what an unfinished run found (`head` of its journal) counts."""
    if not judged(plan):
        return plan
    settings = Settings.of_this_machine()
    key = fingerprint(plan, source, "cpu", text, settings)
    found = recalled(head or {}, key)
    if found is None:
        with tempfile.TemporaryDirectory(prefix="lowbit-") as room:
            total = plan.bytes_before
            told = (lambda name: progress(f"ranges of inputs: {name}", 0, total)) if progress else (lambda name: None)
            found = survey(plan, source, text, Path(room), settings, key, told)
    return with_survey(plan, source, found)


def _check_device(device: torch.device | str) -> None:
    """RecipeError when there is no such device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(
            f"device {str(device)!r} cannot be used here ({str(error).splitlines()[0]}); try cpu"
        ) from None


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter or buffer of the model its values."""
    with torch.no_grad():
        dict(module.state_dict(keep_vars=True))[name].copy_(value)


def _has_ids(calibration: Any) -> bool:
    """Whether calibration data is token ids already, so that no tokenizer is needed."""
    if isinstance(calibration, (str, Path)):
        return False
    return not (
        isinstance(calibration, (list, tuple)) and calibration and isinstance(calibration[0], (str, list, dict))
    )


def _in_memory(
    model: nn.Module, source: Source, plan: Plan, progress: Progress | None, device: torch.device | str,
    calibration: Calibration | None = None, on_layer: OnLayer | None = None,
) -> Quantized:  # fmt: skip
    if calibration is None:
        solved = list(solved_tensors(plan, source, progress, device=device, on_layer=on_layer))
    else:
        with tempfile.TemporaryDirectory(prefix="lowbit-") as room:
            settings = Settings.of_this_machine()
            run = CalibratedRun(plan, source, calibration, Path(room), settings)
            solved = list(reported(run.results(), plan, progress, on_layer))
            solved = tune_solved(plan, source, calibration, solved, settings, progress)
    facts = {s.plan.name: solved_facts(s) for s, _ in solved}
    result = Quantized(plan, make_report(plan, facts, calibration), source)
    # The copy shares memory with the model, but not its Parameter objects: a cast of the copy would change these.
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    shared |= {id(b): b.detach() for b in model.buffers()}
    changed = bool(plan.recipe.transforms) or plan.recipe.tuner is not None
    if changed:  # a head may be untied, and kept tensors differ: nothing is shared
        result._model = copy.deepcopy(source.load_float(next(model.parameters()).dtype)).eval()
    else:
        result._model = copy.deepcopy(model, shared).eval()
    packed = {}
    for s, _ in solved:
        q = s.qtensor()
        if q is not None:
            q = q.to(next(model.parameters()).device)
            extra = {part: s.stored[f"{s.plan.name}.{part}"] for part in s.plan.input_parts()}
            packed[s.plan.name] = PackedWeight.of(
                q, transposed=s.plan.transposed, dtype=s.plan.dtype, inputs=s.plan.inputs, input_parts=extra
            )
        elif changed:
            _set(result._model, s.plan.name, s.stored[s.plan.name])
    swap(result._model, packed, plan.tied)
    if source.config is not None:
        from lowbit.interchange.hf.quantizer import attach

        attach(result._model, quantization_config(plan, facts))
    result._solved = solved
    return result


def plan(
    model: str | Path | nn.Module, recipe: str | Format | Recipe = "w4", *, context: int = 4096,
    max_shard_bytes: int = MAX_SHARD,
) -> Plan:  # fmt: skip
    """What a recipe would make of a model, from its config and headers alone: no weight is read."""
    wanted = Recipe.of(recipe)
    return make_plan(rewritten(open_headers(model), wanted), wanted, context=context, max_shard_bytes=max_shard_bytes)


def quantize_tensor(x: Tensor, recipe: str | Format | Recipe) -> QTensor:
    """Quantize one tensor of 0 to 3 dimensions by the linear-layer part of a recipe."""
    wanted = Recipe.of(recipe)
    if x.dim() > 3:
        raise WeightError(f"a tensor of {x.dim()} dimensions has no rows and columns; reshape it to 3 or fewer")
    check_finite(x, "x")
    fmt = in_range(x, wanted.format)
    found: QTensor = wanted.solver_for(fmt)(x.to(torch.float32), fmt, wanted.fit_for(fmt), None)
    return found


def _required(folder: Path | None) -> Path:
    if folder is None:
        raise SourceError("this result has no folder; save it first")
    return folder
