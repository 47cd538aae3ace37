"""How much work quantizing spends on calibration, and how that is chosen where nobody says: a ladder of efforts.

A name such as `w4` means 4.5 bits, and leaves it open how its codes are found: by rounding alone, with errors weighed by the inputs that the
weights are multiplied with, or by a solver that lets later weights make up for the errors of earlier ones. Each takes more time than
the one before and loses less. Where nobody chooses, a forecast of the time on this machine does. A recipe that is spelled out does what it says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowbit.calibration.package_text import BUILTIN
from lowbit.errors import LowbitError, RecipeError, TextError
from lowbit.interchange.source import Source
from lowbit.recipes.recipe import Recipe

AUTO = "auto"
PATIENCE = 600.0  # seconds: longer calibration is not started unasked


@dataclass(frozen=True)
class Effort:
    """One rung. samples: windows of calibration text, 0 for none. solver: whether the recipe's calibrated form is taken, or its
    data-free form with errors weighed by the inputs."""

    name: str
    samples: int
    solver: bool


NONE = Effort("none", 0, False)  # the scales with the least error of the weights alone
LOW = Effort("low", 6, False)  # errors count more where inputs are large
MEDIUM = Effort("medium", 12, True)  # later weights make up for the errors of earlier ones
HIGH = Effort("high", 64, True)  # the same with better statistics
EFFORTS = {effort.name: effort for effort in (NONE, LOW, MEDIUM, HIGH)}
CHOICES = (AUTO, *EFFORTS)
UNASKED = (MEDIUM, LOW)  # what may be chosen where nobody chooses, the best first; none of them: `NONE`

Forecast = Callable[[Recipe, int], float]
"""Seconds of quantizing by a recipe with so many windows of text, on this machine."""


@dataclass(frozen=True)
class Decision:
    """What a run does about text: arguments of `quantize`, and why.

    recipe: the one that is run. calibration, samples: as in `quantize`. effort: the rung, None where a recipe that is spelled out or a
    text that was given leaves nothing to choose. seconds: what quantizing is forecast to take, None where nothing was forecast.
    longer: the next rung that was not taken for its time, and its seconds. reason: why there is no text where there might be.
    """

    recipe: Recipe
    calibration: Any = None
    samples: int | None = None
    effort: Effort | None = None
    seconds: float | None = None
    longer: tuple[Effort, float] | None = None
    reason: str = ""


def effort_named(name: str) -> Effort | None:
    """The rung of that name, None for "auto". RecipeError for any other."""
    if name == AUTO:
        return None
    if name not in EFFORTS:
        raise RecipeError(f"effort {name!r} is unknown: use {', '.join(CHOICES[:-1])} or {CHOICES[-1]}")
    return EFFORTS[name]


def decide(
    recipe: Recipe, effort: str, *, calibration: Any = None, samples: int | None = None,
    calibrated: Recipe | None = None, why_not: Callable[[], str] = lambda: "", forecast: Forecast | None = None,
    pieces: Callable[[], int] = lambda: 1,
) -> Decision:  # fmt: skip
    """What to do about text.

    recipe      as it was asked for; `calibrated` its form with text, None where it is what `recipe.calibrated()` says
    effort      "auto", or the name of a rung
    calibration text that was given, with `samples` windows
    why_not     a sentence that says why this model cannot be calibrated on text, empty where it can
    pieces      into how many shorter ones a window is cut for this model
    forecast    None where nothing is to be forecast; it raises LowbitError where calibration does not work for the model

    RecipeError for an effort that the recipe would ignore, and for text with effort "none".
    """
    wanted, solved = effort_named(effort), calibrated or recipe.calibrated()
    needs = recipe.needs_calibration is not None
    if wanted is NONE:
        _check_none(recipe, calibration, samples, needs)
        return Decision(recipe, effort=NONE, seconds=None if forecast is None else forecast(recipe, 0))
    if calibration is not None:
        form = recipe if wanted is LOW and not needs else solved
        rung = wanted or (MEDIUM if isinstance(calibration, str) and calibration == BUILTIN else None)
        count = samples if samples is not None or rung is None else rung.samples * pieces()
        return Decision(form, calibration, count, wanted, _seconds(forecast, form, count))
    if needs:  # a spelled method that cannot do without
        count = samples or (wanted or MEDIUM).samples * pieces()
        return Decision(solved, BUILTIN, count, wanted, _seconds(forecast, solved, count))
    if wanted is not None:
        form = solved if wanted.solver else recipe
        if not form.uses_calibration:
            raise RecipeError(
                f"{recipe.title} does not look at calibration text, so the effort would be ignored; leave it out"
            )
        if problem := why_not():
            raise TextError(f"{problem}; leave the effort out, or give token ids as calibration data")
        count = samples or wanted.samples * pieces()
        return Decision(form, BUILTIN, count, wanted, _seconds(forecast, form, count))
    if solved == recipe or solved.tuner is not None:  # nothing trains unasked
        return Decision(recipe, seconds=None if forecast is None else forecast(recipe, 0))
    return _unasked(recipe, solved, samples, why_not, forecast, pieces)


def _unasked(
    recipe: Recipe, solved: Recipe, samples: int | None, why_not: Callable[[], str], forecast: Forecast | None,
    pieces: Callable[[], int],
) -> Decision:  # fmt: skip
    if problem := why_not():
        return Decision(recipe, effort=NONE, seconds=None if forecast is None else forecast(recipe, 0), reason=problem)
    if forecast is None:
        return Decision(solved, BUILTIN, samples or MEDIUM.samples * pieces(), MEDIUM)
    longer: tuple[Effort, float] | None = None
    for rung in UNASKED:
        form, count = solved if rung.solver else recipe, samples or rung.samples * pieces()
        try:
            seconds = forecast(form, count)
        except LowbitError as error:
            return Decision(recipe, effort=NONE, seconds=forecast(recipe, 0), reason=str(error))
        if seconds <= PATIENCE:
            return Decision(form, BUILTIN, count, rung, seconds, longer)
        longer = longer or (rung, seconds)
    return Decision(recipe, effort=NONE, seconds=forecast(recipe, 0), longer=longer)


def _seconds(forecast: Forecast | None, recipe: Recipe, samples: int | None) -> float | None:
    """What was asked for is tried, even where a forecast of it fails."""
    try:
        return None if forecast is None or samples is None else forecast(recipe, samples)
    except LowbitError:
        return None


def _check_none(recipe: Recipe, calibration: Any, samples: int | None, needs: bool) -> None:
    if needs:
        raise RecipeError(f"{recipe.title} cannot do without calibration text; leave data_free (--data-free) out")
    if calibration is not None or samples is not None:
        raise RecipeError(
            "calibration text would be ignored without effort; leave --data-free (effort='none') or the text out"
        )


def no_text_for(source: Source) -> str:
    """Why a model is not calibrated on text, as a sentence; empty where it can be."""
    from lowbit.interchange.hf.models import model_class

    if source.config is None:
        return "the model has no config, so it is quantized without text"
    kind = model_class(source.config)
    if "input_ids" not in inspect.signature(kind.forward).parameters:
        return "the model does not read text, so it is quantized without any"
    try:
        source.tokenizer()
    except LowbitError as error:
        return f"text needs a tokenizer ({error}), so the model is quantized without"
    return ""
