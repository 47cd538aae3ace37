"""What a run does about calibration text, for a model at hand: `effort.decide` with a forecast of this machine behind it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from lowbit.calibration.data import LENGTH, PASSAGE, pieces_of
from lowbit.errors import LowbitError, RecipeError
from lowbit.interchange.files.finished import MANIFEST
from lowbit.interchange.files.folder_writer import head_of
from lowbit.interchange.files.settings import read_json
from lowbit.interchange.opening import open_source
from lowbit.interchange.source import Source
from lowbit.pipeline.effort import AUTO, NONE, UNASKED, Decision, Effort, decide, no_text_for
from lowbit.pipeline.forecast import Rates
from lowbit.pipeline.options import EFFORT, Options
from lowbit.pipeline.rehearsal import rehearse
from lowbit.planning.plan import Plan, make_plan
from lowbit.recipes.recipe import Recipe
from lowbit.recipes.rewriting import rewritten


def decided(
    model: str | Path | nn.Module | Source, recipe: Recipe, effort: str, options: Options, out: str | Path | None = None, *,
    calibrated: Recipe | None = None, told: bool = False,
) -> Decision:  # fmt: skip
    """See `decide`. out: where the result goes, so that a run that was killed, or is done already, is met with the effort that it had.
    told: whether somebody is to hear how long it takes, so that it is forecast even where there is nothing to choose."""
    if effort == NONE.name and (ignored := list(options.of_text())):
        raise RecipeError(
            f"{' and '.join(ignored)} would be ignored, as effort none (--data-free) takes no text; leave one or the other out"
        )
    solved = calibrated or recipe.calibrated()
    before = (
        None if effort != AUTO or options.calibration is not None else _before(out, recipe, solved, options.overwrite)
    )
    open_ = solved != recipe and solved.tuner is None
    chooses = effort == AUTO and options.calibration is None and open_ and before is None
    text = (
        chooses or options.calibration is not None or effort not in (AUTO, NONE.name) or bool(recipe.needs_calibration)
    )
    rehearsal = _Rehearsal(model, (recipe, solved), options, out, text)
    told = told and before is None  # of what is there already only the rest is done
    return decide(
        recipe, effort if before is None else before.name, calibration=options.calibration, samples=options.samples,
        calibrated=calibrated, why_not=rehearsal.why_not, forecast=rehearsal.forecast if told or chooses else None,
        pieces=rehearsal.pieces,
    )  # fmt: skip


class _Rehearsal:
    """The model opened, planned and rehearsed when it is first asked for."""

    def __init__(
        self, model: str | Path | nn.Module | Source, recipes: tuple[Recipe, ...], options: Options, out: str | Path | None, text: bool
    ) -> None:  # fmt: skip
        """text: whether runs over text are to be forecast."""
        self.text = text
        self.model, self.recipes, self.options, self.out = model, tuple(dict.fromkeys(recipes)), options, out
        self._plans: dict[str, Plan] = {}

    @cached_property
    def source(self) -> Source:
        return open_source(self.model, tokenizer=self.options.tokenizer)

    @cached_property
    def rates(self) -> Rates:
        return rehearse(self._plan(self.recipes[0]), self.source, self.recipes, text=self.text, near=self.out)

    def why_not(self) -> str:
        """Why this model is not calibrated on text; empty where it can be."""
        if str(self.options.device) != "cpu":
            return "calibrated methods run on the CPU in this version, so the model is quantized without text"
        return no_text_for(self.source)

    def pieces(self) -> int:
        """Into how many shorter ones a window of text is cut for this model."""
        return 1 if self.options.length is not None else pieces_of(self.source)

    def forecast(self, recipe: Recipe, samples: int) -> float:
        """Seconds of quantizing with so many windows of text."""
        length = self.options.length or LENGTH // self.pieces()
        return self.rates.seconds(self._plan(recipe), recipe, samples * length, length).seconds

    def _plan(self, recipe: Recipe) -> Plan:
        key = str(recipe)
        if key not in self._plans:
            self._plans[key] = make_plan(rewritten(self.source, recipe), recipe)
        return self._plans[key]


def _before(out: str | Path | None, plain: Recipe, solved: Recipe, overwrite: bool) -> Effort | None:
    """The effort of the run that left `out` unfinished, or that wrote it where it is not to be overwritten, if it is one that is chosen
    unasked; None where there is none. Without text there is nothing to meet again: whoever asked for that says so again."""
    if out is None:
        return None
    known = {effort.name: effort for effort in UNASKED}
    try:
        told: Any = head_of(out).get(EFFORT)
        if isinstance(told, str):
            return known.get(told)
        manifest: Any = {} if overwrite else read_json(Path(out) / MANIFEST)
    except (LowbitError, OSError, RuntimeError, ValueError):  # among them names that no system takes
        return None
    recipe, calibration = (manifest.get(key) for key in ("recipe", "calibration"))
    if not isinstance(recipe, dict) or not isinstance(calibration, dict):
        return None
    text, windows = recipe.get("text"), calibration.get("windows")
    counts = {e: (e.samples, e.samples * LENGTH // PASSAGE) for e in UNASKED}
    return next((e for e in UNASKED if windows in counts[e] and text == str(solved if e.solver else plain)), None)
