"""Which recipe to take: the best quality that fits into a given memory, or the fastest of acceptable quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lowbit.budget.memory import OVERHEAD
from lowbit.budget.sizes import parse_size
from lowbit.calibration.data import SAMPLES
from lowbit.calibration.package_text import BUILTIN
from lowbit.errors import RecipeError, SourceError
from lowbit.interchange.hf.models import model_class
from lowbit.interchange.opening import open_headers
from lowbit.interchange.progress import heard
from lowbit.interchange.source import Source
from lowbit.kv import CacheFormat
from lowbit.measure import api
from lowbit.measure.environment import free_memory
from lowbit.measure.expected_loss import measuring_seconds
from lowbit.measure.quality import Progress
from lowbit.planning.cache_fit import fitted_cache
from lowbit.planning.kv_cache import kv_cache, longest_context
from lowbit.report.choices import OWN, Choice, active_experts, choices
from lowbit.report.recommendation import ACCEPTABLE, OWN_TEXT, Recommendation, about
from lowbit.report.wording import bytes_text

CONTEXT = 4096
TOP, WINDOWS, LENGTH = 3, 2, 1024  # choices that are measured, on so many windows of so many tokens
_SMALLER = 0.95  # a second choice that loses more takes at most this share of the bytes of the first


def recommend(
    model: str | Path | nn.Module,
    memory: int | str | None = None,
    context: int | None = None,
    target: str = OWN,
    *,
    cache: str | CacheFormat | None = None,
    speed: bool = False,
    measure: bool = False,
    calibration: Any = None,
    samples: int | None = None,
    text: Any = None,
    windows: int = WINDOWS,
    length: int = LENGTH,
    progress: Progress | bool | None = None,
    told: Callable[[str], None] | None = None,
) -> Recommendation:
    """The best recipe for `model` that fits into `memory`, from its config and headers alone: no weight is read.

    memory: bytes or text such as "8GB" for weights, the KV cache of `context` tokens and the program; None for what this
    machine has free. context: None for 4096 tokens, or the model's maximum where that is less. target: the program that the
    result is for, `lowbit`, or an exporter such as `gguf` or `vllm`. cache: the format of the KV cache, which counts it smaller and goes into the
    recommended recipes as `kv=`; only lowbit has it. `speed`: the fewest bytes read for each token, among losses of at most
    0.05 nats per token. What a recipe is expected to cost are measurements of the same formats on another model.

    With `measure` the best three are made of this model and measured: on `windows` of `length` tokens of `text`, as by `compare`,
    with `samples` windows of `calibration` text where it is given, which is also what the recommended commands name. `told` hears how
    long that takes, `progress(done, in all)` counts windows. RecipeError for options that would be ignored.

    >>> lowbit.recommend(model, "8GB").best.name
    'w8'
    """
    if not measure and text is not None:
        raise RecipeError("a text would be ignored, as nothing is measured; add --measure, or leave it out")
    if samples is not None and calibration is None:
        raise RecipeError("--samples would be ignored, as no calibration text is given; add --calibration")
    if context is not None and context < 1:
        raise RecipeError(f"a context of {context} tokens holds nothing; give 1 or more")
    source, (room, given) = open_headers(model), _memory(memory)
    longest = longest_context(source.config)
    tokens = context if context is not None else min(CONTEXT, longest or CONTEXT)
    generates, reads = _kind(source)
    if cache is not None and target != OWN:
        raise RecipeError(
            f"a cache format is lowbit's own and would be ignored by {target}; leave --cache out, or leave --for out"
        )
    form = None if cache is None else CacheFormat.of(cache)
    kv = fitted_cache(kv_cache(source.config), form, source.label)
    named = _calibration(calibration, reads, measure)
    found = choices(source, model, target, tokens, kv, text=named, samples=samples)
    before = sum(spec.nbytes for spec in source.tensors.values())

    def answer(among: list[Choice], where: str | None = None, also: Sequence[Choice] = ()) -> Recommendation:
        fitting = [c for c in among if c.memory.total <= room]
        best, second, acceptable = _picked(fitting, speed)
        everything = sorted([*among, *also], key=lambda c: c.rank)
        better = [c for c in everything if c.memory.total > room and (not fitting or c.rank < fitting[0].rank)]
        larger = min(better, key=lambda c: (c.memory.total >> 20, c.rank), default=None)
        return Recommendation(
            source.label, target, room, given, tokens, longest, tuple(everything), best, second, larger, speed, acceptable, kv,
            before, source.storage, generates, active_experts(source.config), free_memory(), samples, where,
        )  # fmt: skip

    expected = answer(found)
    if not measure or expected.best is None:
        return expected
    if not reads or not (generates or _fills_gaps(source)):
        raise RecipeError(
            f"--measure compares the next tokens that models predict, and {source.label} predicts none; leave it out"
        )
    tried = _to_measure(expected, calibration is not None)
    rows, where = _measured(model, source, tried, calibration, samples, text, windows, length, heard(progress), told)
    known = [c for c in found if c.loss is None]  # what is left as it is, with no loss to measure
    rest = [c for c in found if c not in tried and c not in known]
    return answer(sorted([*known, *rows], key=lambda c: c.rank), where, rest)


def _memory(memory: int | str | None) -> tuple[int, str | None]:
    """(bytes, as they were given). RecipeError where nothing is given and the system does not say."""
    if memory is not None:
        return parse_size(memory), str(memory) if isinstance(memory, str) else f"{memory:,} bytes"
    free = free_memory()
    if not free:
        raise RecipeError("this system does not say how much memory is free; give --memory, such as --memory 8GB")
    return free, None


def _kind(source: Source) -> tuple[bool, bool]:
    """(whether the model writes text, whether it reads token ids)."""
    if source.config is None:
        return False, False
    found = model_class(source.config)
    reads = getattr(found, "main_input_name", "input_ids") == "input_ids"
    return reads and bool(found.can_generate()), reads


def _fills_gaps(source: Source) -> bool:
    return any("MaskedLM" in name for name in getattr(source.config, "architectures", None) or ())


def _calibration(given: Any, reads: bool, measure: bool) -> str | None:
    """What `--calibration` of the recommended commands is given.

    The text that comes with lowbit where the model reads text, unless one was given.
    """
    if given is not None:
        return str(given) if isinstance(given, (str, Path)) else OWN_TEXT
    if measure or not reads:
        return None
    return BUILTIN


def _picked(fitting: list[Choice], speed: bool) -> tuple[Choice | None, Choice | None, bool]:
    """(the answer, the second choice, whether there was one of acceptable loss) of choices that fit, the best quality first."""
    if not fitting:
        return None, None, False
    good = [c for c in fitting if c.kl <= ACCEPTABLE.kl]
    if not speed or not good:
        smaller = (c for c in fitting[1:] if c.memory.weights < _SMALLER * fitting[0].memory.weights)
        return fitting[0], next(smaller, None), bool(good)
    best = min(good, key=lambda c: (c.read, c.rank))
    if fitting[0].rank[0] < best.rank[0]:
        return best, fitting[0], True
    return best, next((c for c in fitting if c.read < _SMALLER * best.read), None), True


def _to_measure(expected: Recommendation, text: bool) -> list[Choice]:
    """The few of those that fit which are worth measuring: the best expected ones, with `speed` those around the answer."""
    able = [c for c in expected.choices if expected.fits(c) and c.loss is not None]
    if expected.speed:
        able.sort(key=lambda c: (c.kl > ACCEPTABLE.kl, c.read))
    return able[:TOP]


def _measured(
    model: Any, source: Source, tried: list[Choice], calibration: Any, samples: int | None, text: Any, windows: int,
    length: int, progress: Progress | None, told: Callable[[str], None] | None,
) -> tuple[list[Choice], str]:  # fmt: skip
    """The choices with what they cost on this model, and words for the text. SourceError where the model has no room here."""
    parameters = sum(spec.nbytes // spec.dtype.itemsize for spec in source.tensors.values())
    needs, free = OVERHEAD + 4 * parameters, free_memory()
    if free and needs > free:
        raise SourceError(
            f"measuring runs the float model, which takes {bytes_text(needs)}, and {bytes_text(free)} are free here; "
            "leave --measure out, or run it on a larger machine"
        )
    if told is not None:
        seconds = sum(c.seconds for c in tried) + measuring_seconds(parameters, (len(tried) + 1) * windows * length)
        told(f"measuring {len(tried)} recipes on this model: {about(seconds)} on two cores")
    rows = api.compare(
        model, [c.recipe for c in tried], text=text, windows=windows, length=length, calibration=calibration,
        samples=samples or SAMPLES, progress=progress,
    )  # fmt: skip
    found, where = [], ""
    for choice, row in zip(tried, (row for row in rows if not row.is_base), strict=True):
        if row.card is None or row.card.quality is None or row.card.quality.kl_mean is None:
            continue
        found.append(replace(choice, measured=row.card.quality.kl_mean))
        mark = row.card.text
        where = where or ("" if mark is None else f"{mark.windows} windows of {mark.length} tokens of {mark.name}")
    if not found:
        raise SourceError(
            f"none of the recipes could be measured: {next((r.error for r in rows if r.error), 'unknown')}"
        )
    return found, where
