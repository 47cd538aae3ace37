"""What `lowbit quantize` was asked for: names, texts and budgets made into one job, checked before the work."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cli import budgets, console

if TYPE_CHECKING:
    from rich.console import Console

    from lowbit.convert.exporting import Exported
    from lowbit.convert.preparing import Prepared
    from lowbit.interchange.exporters.exporter import Exporter
    from lowbit.interchange.source import Source
    from lowbit.pipeline.api import Quantized
    from lowbit.pipeline.effort import Decision
    from lowbit.recipes.recipe import Recipe


@dataclass(frozen=True)
class CalibrationText:
    """The options about calibration text, as arguments of `lowbit.quantize`. samples: None for as many as usual."""

    calibration: str | None
    samples: int | None
    chat: bool

    def options(self) -> dict[str, Any]:
        return {"calibration": self.calibration, "samples": self.samples, "chat": self.chat}


@dataclass(frozen=True)
class Outcome:
    """What was written. exported: in the format of another program, None for lowbit's own. checked: whether it was there already, so
    that `seconds` went into reading it back and not into quantizing."""

    quantized: Quantized
    exported: Exported | None
    seconds: float
    peak_bytes: int
    checked: bool = False


@dataclass(frozen=True)
class Job:
    """A model and the recipe for it. ready: what another program's format makes of the recipe, None for lowbit's own. given: the model as calls of
    lowbit take it, with an adapter in it where there is one, and called `name` then in the names of files."""

    model: str
    typed: str  # the recipe in the user's words
    recipe: Recipe
    ready: Prepared | None
    text: CalibrationText
    decision: Decision
    given: str | Source
    name: str

    @staticmethod
    def of(
        model: str, recipe: str, target_format: str | None, text: CalibrationText, kv: str | None = None,
        effort: str = "auto", place: Path | None = None, forecast: bool = True, overwrite: bool = False, adapter: str | None = None,
    ) -> Job:  # fmt: skip
        """RecipeError for a recipe that there is not, and for text that it would ignore. place: where lowbit's folder goes, if that is
        known: a run that was killed there, or is done, is met with the effort that it had. forecast: whether its time is told, for which
        some weights are read."""
        from lowbit.convert.quantize_as import prepare_for
        from lowbit.pipeline.choosing import decided
        from lowbit.pipeline.options import Options
        from lowbit.recipes.recipe import Recipe

        options = Options(overwrite=overwrite, calibration=text.calibration, samples=text.samples, chat=text.chat)
        given, name = _with_adapter(model, adapter)
        ready = None
        if target_format is None:
            wanted = Recipe.of(recipe)
            _check_text(wanted, effort, text)
            decision = decided(given, wanted, effort, options, place or default_folder(name, wanted), told=forecast)
            wanted = decision.recipe
        else:
            ready, decision = prepare_for(given, recipe, target_format, effort, options, place, kv, told=forecast)
            wanted = ready.recipe
            if kv is None:
                _check_text(wanted, effort, text)
        if decision.calibration is not None or kv is None:
            text = CalibrationText(
                decision.calibration, decision.samples, text.chat and decision.calibration is not None
            )
        return Job(model, recipe, wanted, ready, text, decision, given, name)

    def default_out(self, target: str = "") -> Path:
        """The name of the result in the current folder, where none is given. target: what it is to meet, as a part of that name."""
        if self.ready is None:
            return default_folder(self.name, self.recipe, target)
        return default_file(self.name, self.typed, self.ready.exporter, target)

    def advice(self) -> tuple[str, ...]:
        """What is unusual in how the recipe groups weights of this model, known from its headers."""
        from lowbit.pipeline.api import plan
        from lowbit.planning.advice import may_advise

        if self.ready is not None:
            return self.ready.plan.advice
        return plan(self.given, self.recipe).advice if may_advise(self.recipe) else ()

    def peak(self, with_card: bool) -> int | None:
        """About how many bytes of memory the command takes at most; None where that is not known before the work, as with `--as`."""
        from lowbit.pipeline.api import plan

        if self.ready is not None:
            return None
        made = plan(self.given, self.recipe)
        with_text = made.calibrated_peak_bytes if self.text.calibration is not None else None
        return max(with_text or made.peak_bytes, (made.card_peak_bytes or 0) if with_card else 0)

    def allocated(self, target: Mapping[str, Any], sensitivity: Path, screen: Console) -> Job:
        """The same with a format for each layer, for this target; what was found is printed."""
        from lowbit.convert.preparing import candidates
        from lowbit.convert.quantize_as import prepare

        kind, kv = (None, None) if self.ready is None else (self.ready.exporter.name, self.ready.kv)
        options = {**self.text.options(), **(candidates(kind, self.given) if kind else {})}
        recipe = budgets.allocated(self.given, self.recipe, dict(target), sensitivity, screen, **options)
        # A recipe that looks at no text leaves it to the allocation.
        text = self.text if recipe.uses_calibration or kv is not None else CalibrationText(None, None, False)
        ready = prepare(self.given, recipe, kind, kv=kv) if kind else None
        return replace(self, recipe=recipe, ready=ready, text=text)

    @property
    def rung(self) -> str:
        """The effort as `lowbit.quantize` is told of it, which chooses no more."""
        return "auto" if self.decision.effort is None else self.decision.effort.name

    @contextmanager
    def run(self, out: Path, keep: Path | None, overwrite: bool) -> Iterator[Outcome]:
        """Quantize and write, with a bar; what came of it can be measured until the end of the block."""
        import lowbit
        from lowbit.convert.quantize_as import quantized_as, work_folder
        from lowbit.measure.memory import peak_resident

        start = time.perf_counter()
        exported = None
        place = out if self.ready is None else keep or work_folder(out)
        before = _written_at(place)
        doing = "quantizing" if before is None or overwrite else f"checking {place}, which is there already"
        with ExitStack() as kept:
            with console.layers_bar(doing) as (progress, on_layer):
                options = {"progress": progress, "on_layer": on_layer, "overwrite": overwrite, **self.text.options()}
                if self.ready is None:
                    options["effort"] = self.rung
                    quantized = lowbit.quantize(self.given, self.recipe, out, **options)
                else:
                    writing = quantized_as(self.given, self.ready, out, keep=keep, **options)
                    quantized, exported = kept.enter_context(writing)
            checked = before is not None and _written_at(place) == before
            yield Outcome(quantized, exported, time.perf_counter() - start, peak_resident(), checked)


def _with_adapter(model: str, adapter: str | None) -> tuple[str | Source, str]:
    """The model as calls take it, and what files of it are called."""
    if adapter is None:
        return model, model
    from lowbit.adapters.source import with_adapter

    return with_adapter(model, adapter), f"{own_name(model)}-{own_name(adapter)}"


def _check_text(recipe: Recipe, effort: str, text: CalibrationText) -> None:
    """RecipeError for options of a text that there is not."""
    from lowbit.errors import RecipeError

    takes_some = text.calibration is not None or effort != "auto" or recipe.has_calibrated_form
    if not takes_some and recipe.needs_calibration is None and (text.samples is not None or text.chat):
        instead = "add --calibration builtin" if recipe.uses_calibration else "leave them out"
        raise RecipeError(
            f"{recipe.title} uses no calibration text, so --samples and --chat would be ignored; {instead}"
        )


def _written_at(folder: Path) -> tuple[int, int] | None:
    """What tells one writing of a finished folder from another; None where there is none."""
    from lowbit.interchange.files.finished import MANIFEST

    try:
        found = (folder / MANIFEST).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def default_file(model: str, recipe: str, kind: Exporter, target: str = "") -> Path:
    """`<model's own name>-<recipe as it was typed>[-<target>]` with the exporter's ending, in the current folder."""
    words = _as_name(recipe.removesuffix(".toml"), target)
    return Path(f"{own_name(model)}-{words}{kind.suffix or '-' + kind.name}")


def default_folder(model: str, recipe: Recipe, target: str = "") -> Path:
    """`<model's own name>-<recipe>[-<target>]` in the current folder."""
    return Path(f"{own_name(model)}-{_as_name(recipe.called or str(recipe), target)}")


def _as_name(recipe: str, target: str) -> str:
    """Both as a part of the name of a file."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{recipe}-{target}").strip("-")


def own_name(model: str) -> str:
    """The model's own name, as files that are made of it begin."""
    path = Path(model)
    return (path.stem if path.suffix == ".gguf" else path.resolve().name if path.is_dir() else path.name) or "model"
