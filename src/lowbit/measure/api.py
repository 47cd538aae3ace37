"""What people call: evaluate one model, compare many recipes on one."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.calibration.data import SAMPLES, SELF, load_calibration
from lowbit.calibration.text import load_text
from lowbit.errors import LowbitError, RecipeError, SourceError
from lowbit.interchange.hf.heads import predicts_tokens
from lowbit.interchange.hf.running import fast_dtype
from lowbit.interchange.opening import open_source
from lowbit.interchange.progress import TEXT, OnStep, Step, heard
from lowbit.interchange.source import Source
from lowbit.measure import compare as table
from lowbit.measure.card import Card, TextMark
from lowbit.measure.compare import Built, CompareRow
from lowbit.measure.compare_base import compared
from lowbit.measure.compare_steps import CompareSteps
from lowbit.measure.environment import environment
from lowbit.measure.files import Files
from lowbit.measure.interleave import STANDARD, SpeedSettings
from lowbit.measure.kept import KEPT_NOWHERE, Keeping
from lowbit.measure.output_card import card_of_outputs, folders_of, makes_embeddings, refuse_inputs, refuse_outputs
from lowbit.measure.quality import Progress, measure_quality
from lowbit.measure.quick import LENGTH, quick_card
from lowbit.measure.row_file import FLOAT, RowFile
from lowbit.measure.sample import kept_sample, take_sample
from lowbit.measure.speed_as_generated import speed_as_generated
from lowbit.measure.streamed_card import quick_streamed_card, streamed_card
from lowbit.measure.subject import open_subject, plan_parts, type_of
from lowbit.measure.windows import Tokens, Windows, make_windows
from lowbit.pipeline.api import Quantized, quantize
from lowbit.pipeline.effort import AUTO, NONE
from lowbit.pipeline.loading import as_dtype
from lowbit.recipes.cache_rules import cache_settings
from lowbit.recipes.presets import PRESETS
from lowbit.recipes.recipe import Recipe


def evaluate(
    model: str | Path | nn.Module | Quantized | Source,
    against: str | Path | nn.Module | Source | None = None,
    text: str | Path | Sequence[str] | None = None,
    *,
    windows: int | None = None,
    length: int | None = None,
    speed: bool | SpeedSettings = False,
    prompt: str | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | str | None = None,
    budget: float | None = None,
    inputs: Any = None,
    keep: str | Path | None = None,
    progress: Progress | bool | None = None,
    told: Callable[[str], None] | None = None,
) -> Card:
    """Measure a model, and against the float model it was made from when `against` is given.

    `model`: a folder that lowbit wrote, a float model by any of its names, a module, or what `quantize` returned
    (which knows its float model). `text`: a file, strings, a dataset id; None is the offline default. `speed`: also
    tokens per second (True: the standard protocol) of what `lowbit generate` runs, the engine or transformers, and of
    the float model in transformers, each figure in the faster of float32 and bfloat16 where it was loaded here; a failure to
    measure it is said on the card. `prompt`: also both models' answers to it. Quality is computed in `dtype`: float32 for what is
    loaded here, and a module's own type, which is not changed. `told` hears what begins, such as "measuring speed", and `progress` how many windows
    of text are done, then how many runs of a program, each of how many. TextError when the text is shorter than a window.

    `budget`: seconds. As many windows as fit, 4 as a rule, in the engine where it knows both models and in float32 otherwise; then an answer
    to `prompt`, speed and memory as far as there is time. The card says what it read. `windows` is obeyed; `speed` and `dtype` are
    refused with it.

    Of a model that predicts no tokens the card has `outputs` instead: how well its embeddings, scores, labels or transcripts agree with the
    float model's. `inputs`: images, sounds or arrays for one that reads them: a folder, a file, or a list of mappings from the names of
    the model's arguments to arrays; None for a few that are made here. `length`: tokens of a window, 1024, and 128 for
    such a model.

    Models in files that take more than about a gigabyte together are measured block by block: neither is ever whole in memory, and the
    figures are the same (`planning/measuring.py` has the rule). Speed and answers are then those of the quantized model alone where
    there is no memory for both, which the card says. A `dtype` other than float32 is computed with whole models.

    `keep`: a folder in which what is measured is kept until all is done; the same call goes on from there when it was killed. RecipeError
    for a model in memory, of which another process knows nothing.

    >>> card = lowbit.evaluate(quantized, model, text, windows=1, length=64)
    >>> card.quality.kl_mean.value > 0  # nats per token
    True
    """
    say = told or (lambda what: None)
    wanted = as_dtype(dtype)
    if budget is not None and (speed is not False or wanted is not None):
        raise RecipeError(
            "a card in limited time chooses how to compute and measures speed where there is time; leave speed and dtype out"
        )
    files = Files.of(model, against, tokenizer)
    if files is None and keep is not None:
        raise RecipeError(
            "keep is for models in files, of which another run knows that they are the same; leave it out"
        )
    keeping = KEPT_NOWHERE if files is None or keep is None else Keeping(Path(keep), files.about())
    streams = (
        files is not None and inputs is None and wanted in (None, torch.float32) and files.streams(length or LENGTH)
    )
    if files is not None and streams and not makes_embeddings(folders_of(model, files.base)):
        how: dict[str, Any] = {
            "windows": windows,
            "length": length or LENGTH,
            "prompt": prompt,
            "say": say,
            "progress": heard(progress),
        }
        if budget is not None:
            return quick_streamed_card(files, text, seconds=budget, keeping=keeping, **how)
        return streamed_card(files, text, speed=_settings(speed), keeping=keeping, **how)
    if budget is not None:
        return quick_card(
            model, against, text, seconds=budget, windows=windows, length=length, prompt=prompt, tokenizer=tokenizer,
            say=say, progress=heard(progress), inputs=inputs, keeping=keeping,
        )  # fmt: skip
    say("loading the model")
    subject = open_subject(model, tokenizer, wanted or torch.float32)
    module, parts = subject.module, subject.parts
    run = wanted or torch.float32 if subject.name is not None else type_of(module, wanted)
    if against is not None or isinstance(model, Quantized):
        say("loading the float model")
    base, base_source = _base(model, against, run)
    if base_source is not None and parts.bytes_before is None:
        parts = replace(parts, bytes_before=sum(spec.nbytes for spec in base_source.tensors.values()))

    def tokenizer_of() -> Any:
        if subject.tokenizer is not None:
            return subject.tokenizer()
        if base_source is None:
            raise SourceError("no tokenizer comes with this model; pass tokenizer=...")
        return base_source.tokenizer()

    folders = folders_of(model, base_source)
    if not predicts_tokens(module) or makes_embeddings(folders):
        return card_of_outputs(
            module, base, parts, tokenizer_of, text, windows, length, say, inputs=inputs, folders=folders,
            progress=heard(progress),
        )  # fmt: skip
    refuse_inputs(inputs, module)
    tok = tokenizer_of()
    tokens = Tokens.of(load_text(text), tok, module)
    cut = tokens.windows(length or LENGTH, windows)
    say(f"measuring quality on {cut.count} window{'' if cut.count == 1 else 's'} of {cut.length} tokens")
    program = f"transformers, {str(run).removeprefix('torch.')}"
    with keeping.on(tokens, length=cut.length, windows=cut.count, prompt=prompt, program=program) as kept:
        quality = measure_quality(module, cut, base=base, progress=heard(progress), kept=kept)
        quality = replace(quality, program=program)
        sample = None
        if prompt:
            say("answering a prompt")
            sample = kept_sample(kept, lambda: take_sample(module, tok, prompt, base=base))
        rates = run_peak = None
        if settings := _settings(speed):
            cast = subject.name is not None and not isinstance(against, nn.Module)
            what = module if subject.name is None else subject.name
            rates, run_peak = speed_as_generated(what, module, base, cast, tok, settings, say, heard(progress))
        return Card(parts, TextMark.of(cut), quality, rates, run_peak, sample, environment())


def compare(
    model: str | Path | nn.Module,
    recipes: Sequence[str] | None = None,
    *,
    text: str | Path | Sequence[str] | None = None,
    windows: int | None = None,
    length: int = 1024,
    speed: bool | SpeedSettings = False,
    tokenizer: Any = None,
    progress: Progress | bool | None = None,
    on_row: Callable[[CompareRow], None] | None = None,
    on_made: Callable[[str, Quantized], None] | None = None,
    calibration: Any = None,
    samples: int = SAMPLES,
    effort: str = AUTO,
    on_step: OnStep | None = None,
    keep: str | Path | RowFile | None = None,
) -> list[CompareRow]:
    """Many recipes on one model, measured in one go; every data-free preset when `recipes` is None.

    `calibration`: text (as in `quantize`) for every recipe that looks at data, with `samples` windows; the others do without. Where none
    is given, `effort` says of names such as "w4" what it says in `quantize`.
    Each recipe is quantized, written, read back by `from_pretrained` and measured. `on_made(recipe, quantized)`
    sees each before it is measured, `on_row` after. `progress(windows done, windows in all)` counts those of the float model and of every
    recipe; `on_step` is told what is at work and the time left. `keep`: a file in which finished rows are kept; rows that it has of this
    model, text and version are not measured again (`CompareRow.earlier`).
    """
    names = _names(recipes, calibration is not None)
    tell = on_step or (lambda step: None)
    source = open_source(model, tokenizer=tokenizer)
    settings = _settings(speed)
    tell(Step("loading the float model"))
    held = compared(model, source, length, source.tokenizer, settings)
    refuse_outputs(held.module)
    tok = source.tokenizer()
    tell(Step("cutting the text into windows"))
    cut = make_windows(load_text(text), tok, length=length, limit=windows, model=held.module)

    def looks_at_text(wanted: Recipe) -> bool:
        if calibration is None:
            return effort != NONE.name and wanted.has_calibrated_form
        return wanted.calibrated().uses_calibration

    def told(name: str, done: int, total: int) -> None:
        if name != TEXT:  # what it takes is no part of the rest
            steps.move(done, total)

    def build(recipe: str) -> Built:
        start = time.perf_counter()
        wanted = Recipe.parse(recipe)
        looks = looks_at_text(wanted)
        if calibration is None:
            text: dict[str, Any] = {"effort": effort if wanted.has_calibrated_form else AUTO}
        else:
            text = {"calibration": calibration} if looks else {"effort": NONE.name}
            text |= {"samples": samples} if looks else {}
        if wanted.needs_calibration is not None:
            text = {"calibration": calibration, "samples": samples}
        made = quantize(model, recipe, tokenizer=tokenizer, progress=told, **text)
        seconds = time.perf_counter() - start
        if on_made is not None:
            on_made(recipe, made)
        built = held.opened(made)
        parts = replace(plan_parts(made.plan), quantize_seconds=seconds)
        return Built(built, parts, lambda: held.backend(made, built))  # it holds what was made, which owns the folder

    file = keep if isinstance(keep, RowFile) or keep is None else RowFile(keep)
    kept, keys = dict[int, Card](), {-1: FLOAT, **{index: _full(name) for index, name in enumerate(names)}}
    if file is not None:
        file.of(_facts(source, held.type, cut, calibration, tok, samples, effort, settings))
        kept = {index: card for index, key in keys.items() if (card := file.card(key)) is not None}

    def finished(row: CompareRow) -> None:
        if file is not None and row.card is not None and not row.earlier:
            file.add(FLOAT if row.is_base else _full(row.recipe), row.card)
        if on_row is not None:
            on_row(row)

    def alike(recipe: str) -> tuple[str, ...]:
        try:
            wanted = Recipe.parse(recipe)
        except LowbitError:
            return ()  # it ends in an error
        with_text = wanted.needs_calibration is not None or looks_at_text(wanted)
        return (f"quantizing {wanted}", f"quantizing {'with' if with_text else 'without'} text")

    steps = CompareSteps(
        names, cut.count, tell, alike, speed=settings is not None, kept=kept,
        redrawn=on_made is not None,
    )  # fmt: skip
    with nullcontext() if file is None else file.noted([key for index, key in keys.items() if index >= 0]):
        rows = table.compare(
            names, build, held.base, held.parts, cut, speed=settings, baseline=held.baseline, progress=heard(progress), on_row=finished,
            steps=steps, kept=kept, built_again=on_made is not None,
        )  # fmt: skip
    return list(rows)


def _full(recipe: str) -> str:
    """A recipe with its name, as rows of it are kept; what does not parse as it is."""
    try:
        return Recipe.parse(recipe).title
    except LowbitError:
        return recipe


def _facts(
    source: Source, run: torch.dtype, cut: Windows, calibration: Any, tokenizer: Any, samples: int, effort: str,
    speed: SpeedSettings | None,
) -> dict[str, Any]:  # fmt: skip
    """Everything that decides the figures of a comparison but the recipe, ready for JSON."""
    machine = environment()
    ids = hashlib.sha256(cut.ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()
    text: dict[str, Any] | str | None = calibration
    if calibration is not None and not (isinstance(calibration, str) and calibration == SELF):
        text = load_calibration(calibration, tokenizer, source, samples=samples).to_json()
    return {
        "model": source.label, "identity": source.identity(), "dtype": str(run), "products": str(fast_dtype()),
        "text": cut.text_name, "text_sha256": cut.text_sha256, "windows": cut.count, "length": cut.length,
        "windows_sha256": ids, "calibration": text, "samples": samples, "effort": effort, "lowbit": machine.lowbit, "torch": machine.torch,
        "transformers": machine.transformers, "speed": None if speed is None else [asdict(speed), machine.machine],
    }  # fmt: skip


def _names(recipes: Sequence[str] | None, calibrated: bool) -> list[str]:
    """The recipes to compare: those given, else every preset that can do with the text that there is."""
    if recipes:
        return [_of_weights(str(one)) for one in ([recipes] if isinstance(recipes, str) else recipes)]
    return [name for name in PRESETS if calibrated or Recipe.parse(name).needs_calibration is None]


def _of_weights(recipe: str) -> str:
    """The recipe as it is. RecipeError where it says something of the cache, which a comparison of weights would ignore."""
    try:
        said = cache_settings(Recipe.parse(recipe).cache)
    except LowbitError:
        return recipe  # the row of it says so
    if said:
        raise RecipeError(
            f"compare measures what the weights lose, and {','.join(said)} would be ignored; leave it out, and measure caches with `lowbit check-kv`"
        )
    return recipe


def _settings(speed: bool | SpeedSettings) -> SpeedSettings | None:
    return STANDARD if speed is True else speed or None


def _base(model: Any, against: Any, dtype: torch.dtype) -> tuple[nn.Module | None, Source | None]:
    if against is None and isinstance(model, Quantized):
        source: Source | None = model.source
    else:
        source = None if against is None else open_source(against)
    return (None, None) if source is None else (source.load_float(dtype), source)
