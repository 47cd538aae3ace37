"""What people call: evaluate one model, compare many recipes on one."""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.calibration.data import SAMPLES
from lowbit.calibration.text import load_text
from lowbit.errors import LowbitError, RecipeError, SourceError
from lowbit.interchange.files.folder_writer import MANIFEST
from lowbit.interchange.files.settings import is_ours
from lowbit.interchange.hf.loading import load_tokenizer
from lowbit.interchange.opening import open_source
from lowbit.interchange.readers.module import ModuleSource
from lowbit.interchange.source import Source
from lowbit.measure import compare as table
from lowbit.measure.as_generated import as_generated
from lowbit.measure.backends import Backend
from lowbit.measure.card import Card, CardParts, Coverage, TextMark
from lowbit.measure.compare import CompareRow
from lowbit.measure.environment import environment
from lowbit.measure.float_model import in_faster_types, rival_of
from lowbit.measure.generation import torch_threads
from lowbit.measure.interleave import SpeedSettings
from lowbit.measure.output_card import card_of_outputs
from lowbit.measure.outputs import predicts_tokens
from lowbit.measure.quality import Progress, measure_quality
from lowbit.measure.sample import take_sample
from lowbit.measure.size import count_parameters, disk_size, module_bytes
from lowbit.measure.speed import STANDARD, Speed, measure_speed
from lowbit.measure.windows import make_windows
from lowbit.nn.swap import packed_weights
from lowbit.pipeline.api import Quantized, quantize
from lowbit.pipeline.loading import as_dtype, load
from lowbit.planning.plan import Plan
from lowbit.recipes.activation_rules import inputs_text
from lowbit.recipes.presets import PRESETS
from lowbit.recipes.recipe import Recipe

_log = logging.getLogger("lowbit")

# Of running a model: lowbit's own, the system's, and those that PyTorch raises, out of memory among them.
_FAILURES = (LowbitError, OSError, MemoryError, RuntimeError)


def evaluate(
    model: str | Path | nn.Module | Quantized,
    against: str | Path | nn.Module | None = None,
    text: str | Path | Sequence[str] | None = None,
    *,
    windows: int | None = None,
    length: int = 1024,
    speed: bool | SpeedSettings = False,
    prompt: str | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
    told: Callable[[str], None] | None = None,
) -> Card:
    """Measure a model, beside the float model it was made from when `against` is given.

    `model`: a folder that lowbit wrote, a float model by any of its names, a module, or what `quantize` returned
    (which knows its float model). `text`: a file, strings, a dataset id; None is the offline default. `speed`: also
    tokens per second (True: the standard protocol) of what `lowbit generate` runs, the engine or transformers, beside
    the float model in transformers, each figure in the faster of float32 and bfloat16 where it was loaded here; a failure to
    measure it is said on the card. `prompt`: also both models' answers to it. Quality is computed in `dtype`: float32 for what is
    loaded here, and a module's own type, which is not changed. `told` hears what begins, such as "measuring speed". TextError when the text is shorter than a window.
    """
    say = told or (lambda what: None)
    run = as_dtype(dtype)
    say("loading the model")
    subject, parts, tok = _subject(model, tokenizer, run)
    if not _loaded_here(model):
        run = _type_of(subject, run)
    if against is not None or isinstance(model, Quantized):
        say("loading the float model")
    base, base_source = _base(model, against, run or torch.float32)
    if base_source is not None and parts.bytes_before is None:
        parts = replace(parts, bytes_before=sum(spec.nbytes for spec in base_source.tensors.values()))
    if not predicts_tokens(subject):
        return card_of_outputs(subject, base, parts, lambda: words(tok, base_source), text, windows, length, say)
    tok = words(tok, base_source)
    cut = make_windows(load_text(text), tok, length=length, limit=windows, model=subject)
    say(f"measuring quality on {cut.count} window{'' if cut.count == 1 else 's'} of {cut.length} tokens")
    quality = measure_quality(subject, cut, base=base, progress=progress)
    sample = None
    if prompt:
        say("answering a prompt")
        sample = take_sample(subject, tok, prompt, base=base)
    settings = STANDARD if speed is True else speed or None
    rates = run_peak = None
    if settings:
        name = model.folder if isinstance(model, Quantized) else model
        what = name if _loaded_here(model) and name is not None else subject
        cast = _loaded_here(model) and not isinstance(against, nn.Module)
        rates, run_peak = _speed(what, subject, base, cast, tok, settings, say)
    return Card(parts, TextMark.of(cut), quality, rates, run_peak, sample, environment())


def words(tokenizer: Callable[[], Any] | None, base: Source | None) -> Any:
    """The tokenizer of a model, else of its float model. SourceError where neither has one."""
    if tokenizer is not None:
        return tokenizer()
    if base is None:
        raise SourceError("no tokenizer comes with this model; pass tokenizer=...")
    return base.tokenizer()


def _speed(
    model: str | Path | nn.Module, subject: nn.Module, base: nn.Module | None, cast: bool, tokenizer: Any,
    settings: SpeedSettings, say: Callable[[str], None],
) -> tuple[Speed, int | None]:  # fmt: skip
    """The speed of `model` as `lowbit generate` runs it, and the peak resident bytes of a fresh process up to its first token.

    cast: the base may be cast, and is then measured in its faster types. What fails is said, and what was measured before stands.
    """
    try:
        say("measuring speed")
        program = as_generated(model, subject, tokenizer)
        other: nn.Module | Backend | None = base
        if base is not None and cast:
            with torch_threads(program.threads):
                other = in_faster_types(base.to, settings)
        found = measure_speed(program, base=other, settings=settings)
    except _FAILURES as error:
        return Speed(skipped=str(error) or type(error).__name__), None
    if program.first is None or found.model is None:
        return found, None
    try:
        say("measuring memory in a fresh process")
        return found, program.first().peak
    except LowbitError as error:
        _log.warning("memory while running is not measured: %s", error)
        return found, None


def compare(
    model: str | Path | nn.Module,
    recipes: Sequence[str] | None = None,
    *,
    text: str | Path | Sequence[str] | None = None,
    windows: int | None = None,
    length: int = 1024,
    speed: bool | SpeedSettings = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
    on_row: Callable[[CompareRow], None] | None = None,
    on_made: Callable[[str, Quantized], None] | None = None,
    calibration: Any = None,
    samples: int = SAMPLES,
) -> list[CompareRow]:
    """Many recipes on one model, measured in one go; every data-free preset when `recipes` is None.

    `calibration`: text (as in `quantize`) for every recipe that looks at data; the others do without.
    Each recipe is quantized, written, read back by `from_pretrained` and measured. `on_made(recipe, quantized)`
    sees each before it is measured, `on_row` after.
    """
    if isinstance(recipes, str):
        recipes = [recipes]
    source = open_source(model, tokenizer=tokenizer)
    data_free = [name for name in PRESETS if Recipe.parse(name).needs_calibration is None]
    names = [str(recipe) for recipe in recipes] if recipes else data_free if calibration is None else list(PRESETS)
    run = _type_of(model, None) if isinstance(model, nn.Module) else torch.float32
    base = source.load_float(run)
    tok = source.tokenizer()
    cut = make_windows(load_text(text), tok, length=length, limit=windows, model=base)
    float_bytes = sum(spec.nbytes for spec in source.tensors.values())
    base_parts = CardParts(
        source.label, str(run).removeprefix("torch."), count_parameters(base), bytes_before=float_bytes,
        weight_bytes=module_bytes(base), linear_bits=8.0 * run.itemsize,
    )  # fmt: skip

    def build(recipe: str) -> tuple[nn.Module, CardParts]:
        start = time.perf_counter()
        looks = calibration is not None and Recipe.parse(recipe).calibrated().uses_calibration
        made = quantize(model, recipe, tokenizer=tokenizer, calibration=calibration if looks else None, samples=samples)
        seconds = time.perf_counter() - start
        if on_made is not None:
            on_made(recipe, made)
        parts = replace(plan_parts(made.plan), quantize_seconds=seconds)
        built = made.model if isinstance(model, nn.Module) else load(_folder(made), dtype=torch.float32)
        built._lowbit_result = made  # type: ignore[assignment]  # its temporary folder lives as long as the model
        return built, parts

    settings = STANDARD if speed is True else speed or None

    def program(built: Any) -> Backend:
        folder = built._lowbit_result.folder if built.can_generate() else None
        return as_generated(built if folder is None else folder, built, tok)

    @functools.cache
    def typed(dtype: torch.dtype) -> nn.Module:  # the base stays what the quality of the next row is held against
        return base if dtype == run else source.load_float(dtype)

    rival = functools.cache(lambda threads: rival_of(base, typed, settings or STANDARD, threads))
    rows = table.compare(
        names, build, base, base_parts, cut, speed=settings, program=program, rival=rival, progress=progress,
        on_row=on_row,
    )  # fmt: skip
    return list(rows)


def plan_parts(plan: Plan) -> CardParts:
    """What a plan knows for the card: sizes, coverage, what was kept and why."""
    quantized = sum(t.count for t in plan.tensors if t.format is not None)
    kept = tuple(f"{count:,} in {n} tensors: {reason}" for reason, (n, count) in plan.kept().items())
    ranges = None if plan.survey is None else plan.survey.to_json()
    notes = (*_inputs_note(plan.input_counts(), ranges), *plan.notes)
    if plan.source_bytes is not None and plan.source_bytes < plan.bytes_before:
        notes += (
            f"the source is itself quantized, a file of {plan.source_bytes / 2**20:.0f} MiB; the size before is of its float values",
        )
    return CardParts(
        plan.label, plan.recipe.title, plan.parameters, Coverage(quantized, plan.parameters, kept),
        bytes_before=plan.bytes_before, weight_bytes=plan.output_bytes, linear_bits=plan.linear_bits_per_weight,
        notes=notes,
    )  # fmt: skip


def _inputs_note(counts: Mapping[str, int], ranges: Mapping[str, Any] | None) -> tuple[str, ...]:
    return (f"inputs: {inputs_text(counts, ranges)}",) if counts else ()


def folder_parts(folder: Path, model: nn.Module) -> CardParts:
    """What a folder that lowbit wrote says of itself, for the card."""
    size = disk_size(folder)
    manifest = json.loads((folder / MANIFEST).read_text("utf-8")) if (folder / MANIFEST).is_file() else {}
    packed = dict(packed_weights(model))
    quantized = sum(math.prod(w.stored_shape) for w in packed.values())
    total = quantized + sum(p.numel() for p in model.parameters())
    recipe = manifest.get("recipe", {})
    said = manifest["notes"] if isinstance(manifest.get("notes"), list) else []
    title = f"{recipe['name']} = {recipe['text']}" if recipe.get("name") else recipe.get("text", "unknown")
    kept = total - quantized
    counts = Counter(str(w.inputs) for w in packed.values() if w.inputs is not None)
    return CardParts(
        str(folder), title, total, Coverage(quantized, total, (f"{kept:,} in float",) if kept else ()),
        bytes_after=size.total, weight_bytes=size.weights, linear_bits=manifest.get("linear_bits_per_weight"),
        notes=(*_inputs_note(dict(counts.most_common()), manifest.get("ranges")), *map(str, said)),
    )  # fmt: skip


def _loaded_here(model: Any) -> bool:
    """Whether `evaluate` loads this model itself, so that its type may be changed."""
    if isinstance(model, Quantized):
        return model.folder is not None and not isinstance(model.source, ModuleSource)
    return not isinstance(model, nn.Module)


def _type_of(module: nn.Module, wanted: torch.dtype | None) -> torch.dtype:
    """The type that a module computes in. RecipeError when another is `wanted`."""
    floats = (p.dtype for p in module.parameters() if p.is_floating_point())
    own: torch.dtype = next(floats, torch.float32)
    if wanted not in (None, own):
        raise RecipeError(f"this module computes in {own}, not {wanted}; cast it first, or leave dtype out")
    return own


def _subject(
    model: Any, tokenizer: Any, dtype: torch.dtype | None
) -> tuple[nn.Module, CardParts, Callable[[], Any] | None]:
    """(module, what is known of it, what gives its tokenizer, or None where it has none of its own)."""
    given = None if tokenizer is None else lambda: tokenizer
    if isinstance(model, Quantized):
        tok = given or model.source.tokenizer
        if model.folder is not None:
            module = load(model.folder, dtype=dtype or torch.float32)
            return module, replace(plan_parts(model.plan), bytes_after=disk_size(model.folder).total), tok
        return model.model, plan_parts(model.plan), tok
    if isinstance(model, nn.Module):
        parts = CardParts(type(model).__name__, "as it is", count_parameters(model), weight_bytes=module_bytes(model))
        return model, parts, given
    path = Path(model)
    if is_ours(path):
        module = load(path, dtype=dtype or torch.float32)
        return module, folder_parts(path, module), given or (lambda: load_tokenizer(path, str(path)))
    source = open_source(model, tokenizer=tokenizer)
    module = source.load_float(dtype or torch.float32)
    return (
        module,
        CardParts(source.label, source.storage, count_parameters(module), weight_bytes=source.disk_bytes()),
        source.tokenizer,
    )


def _base(model: Any, against: Any, dtype: torch.dtype) -> tuple[nn.Module | None, Source | None]:
    if against is None and isinstance(model, Quantized):
        source: Source | None = model.source
    else:
        source = None if against is None else open_source(against)
    return (None, None) if source is None else (source.load_float(dtype), source)


def _folder(made: Quantized) -> Path:
    if made.folder is None:
        raise SourceError("this result has no folder")
    return made.folder
