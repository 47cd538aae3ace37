"""What people call: quantize, plan, quantize_tensor."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.adapters.source import with_adapter
from lowbit.blockwise.range_survey import may_fall_back, survey, survey_in, with_survey
from lowbit.calibration.data import Calibration, load_calibration
from lowbit.display import Displayed
from lowbit.engine.folder_cache import use_cache_format
from lowbit.errors import OutputError, RecipeError, SourceError, WeightError
from lowbit.formats import Format, QTensor
from lowbit.interchange.files.folder_writer import head_of
from lowbit.interchange.files.lock import locked
from lowbit.interchange.files.places import check_apart, replace_folder
from lowbit.interchange.files.undisturbed import forget, temporary_folder, undisturbed
from lowbit.interchange.hf.running import fast_dtype
from lowbit.interchange.opening import check_output, open_headers, open_source
from lowbit.interchange.progress import TEXT, Progress, heard
from lowbit.interchange.source import Source
from lowbit.kv import CacheFormat
from lowbit.kv.folder import write_cache_format
from lowbit.kv.tables import TablesOfLayers
from lowbit.pipeline.choosing import decided
from lowbit.pipeline.driver import fingerprint, write_folder
from lowbit.pipeline.effort import AUTO
from lowbit.pipeline.in_memory import packed_copy, solve_in_memory
from lowbit.pipeline.loading import load
from lowbit.pipeline.options import OnLayer, Options
from lowbit.pipeline.reach import with_reach, with_text
from lowbit.pipeline.report import Report, make_report, solved_facts
from lowbit.planning.plan import MAX_SHARD, Plan, make_plan
from lowbit.planning.used import check_used, uses_text
from lowbit.recipes.recipe import Recipe
from lowbit.recipes.rewriting import rewritten
from lowbit.solvers.ranging import in_range
from lowbit.weights.finite import check_finite, check_source
from lowbit.weights.solve import Solved


class Quantized(Displayed):
    """A quantized model: `plan`, `report`, `model` (packed, ready to run), `save(folder)`. It prints as its layers with their errors."""

    def __init__(self, plan: Plan, report: Report, source: Source, folder: Path | None = None) -> None:
        self.plan, self.report, self.source, self.folder = plan, report, source, folder
        self._model: nn.Module | None = None
        self._solved: list[tuple[Solved, str]] = []
        self._tables: TablesOfLayers | None = None

    @property
    def model(self) -> nn.Module:
        """The model with packed weights, loaded when first asked for."""
        if self._model is None:
            self._model = load(_required(self.folder))
        return self._model

    @property
    def cache(self) -> CacheFormat | None:
        """The format in which the result stores its KV cache; None where nothing says any."""
        return self.plan.kv.format

    def store_cache(self, cache: CacheFormat, tables: TablesOfLayers | None = None) -> None:
        """Let the result store its KV cache in this format, with what calibration found for it, and its folder carry it."""
        self.plan, self._tables = self.plan.with_cache(cache), tables
        if self.folder is not None:
            write_cache_format(self.folder, cache, tables)
        if self._model is not None:
            use_cache_format(self._model, cache, tables)
            section: Any = getattr(getattr(self._model, "config", None), "quantization_config", None)
            if section is not None:
                section.kv = str(cache)

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the model folder `out`. OutputError when it is not empty and `overwrite` is not set."""
        if self._solved:
            with locked(out):
                options = Options(overwrite=overwrite)
                write_folder(self.plan, self.source, out, options, solved=iter(self._solved), again=False)
            if self._tables:
                write_cache_format(out, self.cache, self._tables)
            return Path(out)
        folder, out = _required(self.folder), Path(out)
        if out.resolve() == folder.resolve():
            return out
        if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(f"{out} is not empty; give another folder, or overwrite=True to replace it")
        check_apart(folder, out)
        fresh = out.resolve().with_name(f".{out.resolve().name}.lowbit-saving")
        try:
            with locked(out):
                try:
                    shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed
                    shutil.copytree(folder, fresh)
                    replace_folder(fresh, out.resolve())
                finally:
                    with undisturbed():
                        shutil.rmtree(fresh, ignore_errors=True)
        except OSError as error:
            raise OutputError(
                f"cannot write {out}: {error.strerror or error}; check the path and its permissions"
            ) from error
        return out

    def _brief(self) -> str:
        bits = f"{self.plan.bits_per_weight:.3f} bits per weight"
        return f"{self.plan.label}, {self.plan.recipe.called or self.plan.recipe}, {bits}"


def quantize(
    model: str | Path | nn.Module | Source,
    recipe: str | Format | Recipe = "w4",
    out: str | Path | None = None,
    *,
    tokenizer: Any = None,
    progress: Progress | bool | None = None,
    max_shard_bytes: int = MAX_SHARD,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    calibration: Any = None,
    samples: int | None = None,
    length: int | None = None,
    chat: bool = False,
    effort: str = AUTO,
    on_layer: OnLayer | None = None,
    adapter: str | Path | None = None,
) -> Quantized:
    """Quantize a model: a Hugging Face id, a folder, a .gguf file, `smollm2`, or a module in memory.

    With `out` (and always for names) the work goes tensor by tensor from file to file; without `out` a name
    goes to a temporary folder that lives as long as the result. A module is not changed: the result's `model` is a
    copy that shares what was kept. `progress(name, bytes done, bytes in all)`.

    `effort`: how much work goes into calibration. A name such as "w4" says how many bits there are, and leaves open how the codes are
    found: "none" looks at no text, "low" weighs errors by the inputs on text, "medium" and "high" let later weights make up for the errors
    of earlier ones; "auto" takes the best that a forecast says is done within ten minutes. A recipe that is spelled
    out, such as "search@int4:g32", does what it says, and so does any recipe for a model that writes no text or has no tokenizer.

    `calibration`: the text: a file, a list of strings, a dataset id, token ids, a DataLoader, "builtin" for the text that comes with
    lowbit, which is taken where none is given, or "self" for text that the model writes itself. `samples` windows (32, or as many as the effort has) of
    `length` tokens (1024); `chat` wraps documents in the model's chat template. `on_layer(solved)` sees each tensor with its errors when it
    is done. `adapter`: the folder of a LoRA adapter, which is merged into each weight as it is read (`with_adapter`); the bytes are those of
    merging first and quantizing then. RecipeError for a text that the recipe does not look at, and for `samples`, `length` and `chat` without a text.

    >>> q = lowbit.quantize(model, "w4")
    >>> q.plan.linear_bits_per_weight
    4.5
    """
    if adapter is not None:
        model, tokenizer = with_adapter(model, adapter, tokenizer=tokenizer), None
    options = Options(
        tokenizer, heard(progress), max_shard_bytes, overwrite, device, calibration, samples, length, chat, on_layer
    )
    wanted, options = _decided(Recipe.of(recipe), model, options, effort, out)
    _check_device(device)
    if out is not None:
        check_output(model, out)
    with locked(out) if out is not None else nullcontext():
        return _quantized(model, wanted, out, options)


def _decided(
    recipe: Recipe, model: str | Path | nn.Module | Source, options: Options, effort: str, out: str | Path | None
) -> tuple[Recipe, Options]:  # fmt: skip
    """The recipe in the form that is run, and the text for it. RecipeError for what would be ignored."""
    open_ = effort != AUTO or options.calibration is not None or recipe.has_calibrated_form
    if not open_ and options.of_text() and recipe.needs_calibration is None:
        instead = "add calibration='builtin', or leave it out" if recipe.uses_calibration else "leave it out"
        raise RecipeError(
            f"{' and '.join(options.of_text())} would be ignored, as {recipe.title} is given no calibration text; {instead}"
        )
    decision = decided(model, recipe, effort, options, out)
    if decision.calibration is not None:
        _check_uses(decision.recipe.uses_calibration, decision.recipe)
    rung = None if decision.effort is None else decision.effort.name
    if decision.calibration is None:
        options = replace(options, length=None, chat=False)  # of the text that there would have been
    return decision.recipe, replace(options, calibration=decision.calibration, samples=decision.samples, effort=rung)


def _quantized(
    model: str | Path | nn.Module | Source, wanted: Recipe, out: str | Path | None, options: Options
) -> Quantized:
    """`quantize` by a recipe that is ready, onto an output that nobody else writes."""
    given = open_source(model, tokenizer=options.tokenizer)
    source = rewritten(given, wanted)
    plan = make_plan(source, wanted, max_shard_bytes=options.max_shard_bytes)
    if not any(t.format is not None for t in plan.tensors):
        raise RecipeError(f"nothing in {source.label} can be quantized by {wanted}: every tensor is kept")
    text = None if options.calibration is None else _text(given, source, plan, options)
    plan = plan if text is None else with_text(plan, source)
    key = fingerprint(plan, source, options.device, text)
    if text is not None and may_fall_back(plan):
        plan = _surveyed(plan, source, text, key, None if out is None else head_of(out), options.progress)
    if isinstance(model, nn.Module) and out is None:
        return _in_memory(model, source, plan, options, text)
    folder = Path(tempfile.mkdtemp(prefix="lowbit-")) if out is None else None
    target = Path(out) if out is not None else folder / "model"  # type: ignore[operator]
    try:
        report = write_folder(plan, source, target, options, text, key=key, again=out is not None)
    except BaseException as error:
        with undisturbed():
            if folder is not None:
                forget(folder, error)
                shutil.rmtree(folder, ignore_errors=True)
        raise
    result = Quantized(plan, report, source, target)
    if folder is not None:
        weakref.finalize(result, shutil.rmtree, folder, ignore_errors=True)
    return result


def _text(given: Source, source: Source, plan: Plan, options: Options) -> Calibration:
    """The calibration text of a run. RecipeError where no tensor of the plan is the better for it."""
    _check_uses(uses_text(plan.recipe, plan.tensors), plan.recipe)
    check_used(plan.recipe, plan.tensors, with_text=True)
    if str(options.device) != "cpu":
        raise RecipeError("calibrated methods run on the CPU in this version; leave device out")
    check_source(given, plan.recipe)
    tokenizer = None if _has_ids(options.calibration) else source.tokenizer()
    told = options.progress

    def on_token(done: int, total: int) -> None:
        if told is not None:
            told(TEXT, plan.bytes_before * done // total, plan.bytes_before)

    return load_calibration(options.calibration, tokenizer, source, on_token=on_token, **options.of_text())


def _check_uses(used: bool, recipe: Recipe) -> None:
    if not used:
        raise RecipeError(f"{recipe.title} does not look at calibration text; leave calibration out")


def _surveyed(
    plan: Plan, source: Source, text: Calibration, key: str, head: dict[str, Any] | None, progress: Progress | None
) -> Plan:
    """The plan after its static ranges were looked at; what an unfinished run found (`head` of its journal) counts.

    `key`: the fingerprint of the run.
    """
    found = survey_in(head or {}, key)
    if found is None:

        def on_block(name: str) -> None:
            if progress is not None:
                progress(f"ranges of inputs: {name}", 0, plan.bytes_before)

        with temporary_folder() as folder:
            found = survey(plan, source, text, folder, fast_dtype(), key, on_block)
    return with_survey(plan, source, found)


def _in_memory(model: nn.Module, source: Source, plan: Plan, options: Options, text: Calibration | None) -> Quantized:
    solved = solve_in_memory(plan, source, options, text)
    facts = {s.plan.name: solved_facts(s) for s, _ in solved}
    result = Quantized(plan, make_report(plan, facts, text), source)
    result._model = packed_copy(model, source, plan, [s for s, _ in solved], facts)
    result._solved = solved
    return result


def _check_device(device: torch.device | str) -> None:
    """RecipeError when there is no such device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(
            f"device {str(device)!r} cannot be used here ({str(error).splitlines()[0]}); try cpu"
        ) from None


def _has_ids(calibration: Any) -> bool:
    """Whether calibration data is token ids already, so that no tokenizer is needed."""
    if isinstance(calibration, (str, Path)):
        return False
    return not (
        isinstance(calibration, (list, tuple)) and calibration and isinstance(calibration[0], (str, list, dict))
    )


def plan(
    model: str | Path | nn.Module | Source, recipe: str | Format | Recipe = "w4", *, context: int = 4096,
    max_shard_bytes: int = MAX_SHARD,
) -> Plan:  # fmt: skip
    """What a recipe would make of a model, from its config and headers alone: no weight is read. Sizes are bytes, exact.

    `context`: tokens that the KV cache is sized for. `max_shard_bytes`: a larger model has several weight files. RecipeError for a
    recipe that does nothing for this model, SourceError for what is no model.

    >>> lowbit.plan(model, "int8:channel").linear_bits_per_weight < 10
    True
    """
    wanted = Recipe.of(recipe)
    source = rewritten(open_headers(model), wanted)
    return with_reach(make_plan(source, wanted, context=context, max_shard_bytes=max_shard_bytes), source)


def quantize_tensor(x: Tensor | Sequence[Any], recipe: str | Format | Recipe) -> QTensor:
    """Quantize one tensor of 0 to 3 dimensions by the linear-layer part of a recipe, without statistics of its input: a
    solver that needs them gives way to round-to-nearest. `x`, a tensor or lists of numbers, is rounded in float32, and must be
    finite (WeightError).

    >>> q = lowbit.quantize_tensor(torch.tensor([-0.3, 0.0, 0.1, 0.7]), "absmax")
    >>> q.dequantize().shape, q.nbytes
    (torch.Size([4]), 8)
    """
    wanted = Recipe.of(recipe)
    if not isinstance(x, Tensor):
        x = _of_numbers(x)
    if x.dim() > 3:
        raise WeightError(f"a tensor of {x.dim()} dimensions has no rows and columns; reshape it to 3 or fewer")
    check_finite(x, "x")
    fmt = in_range(x, wanted.format)
    return wanted.solver_for(fmt).solve(x.to(torch.float32), fmt, wanted.fit_for(fmt), None).weight


def _of_numbers(x: Sequence[Any]) -> Tensor:
    """Lists of numbers as float32. WeightError for what is none."""
    try:
        return torch.as_tensor(x, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise WeightError("x is a tensor, or numbers in lists of one length, such as [-0.3, 0, 0.1, 0.7]") from None


def _required(folder: Path | None) -> Path:
    if folder is None:
        raise SourceError("this result has no folder; save it first")
    return folder
