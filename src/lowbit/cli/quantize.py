"""lowbit quantize"""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli import console, targets
from lowbit.cli.export import told
from lowbit.cli.options import (
    Calibration,
    Chat,
    Context,
    FitMemory,
    Json,
    Model,
    Recipe,
    Samples,
    SensitivityFile,
    StraightAs,
    TargetBits,
    TargetKL,
    TargetSize,
    Text,
)  # fmt: skip

if TYPE_CHECKING:
    from lowbit.interchange.exporters.target import Target
    from lowbit.pipeline.recipe import Recipe as RecipeValue

_PROMPT = "What is the capital of France?"
_LENGTH = 1024


def register(app: typer.Typer) -> None:
    app.command(epilog="Example:  lowbit quantize smollm2 w4 -o small")(quantize)


def quantize(
    model: Model,
    recipe: Recipe = "w4",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="What to write; MODEL-RECIPE when left out.", show_default=False),
    ] = None,
    target_format: StraightAs = None,
    keep: Annotated[
        Path | None,
        typer.Option("--keep", help="With --as: also keep lowbit's folder, under this name.", show_default=False),
    ] = None,
    calibration: Calibration = None,
    samples: Samples = None,
    chat: Chat = False,
    target_size: TargetSize = None,
    target_bits: TargetBits = None,
    target_kl: TargetKL = None,
    fit_memory: FitMemory = None,
    context: Context = None,
    sensitivity: SensitivityFile = None,
    text: Text = None,
    windows: Annotated[int, typer.Option(min=1, help="How many windows of the text the card is measured on.")] = 4,
    card: Annotated[bool, typer.Option("--card/--no-card", help="Reload the result and measure what it cost.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL, read it back, and measure what that cost."""
    import lowbit
    from lowbit.errors import LowbitError, RecipeError
    from lowbit.measure.memory import peak_resident
    from lowbit.pipeline.calibration import SAMPLES
    from lowbit.pipeline.recipe import Recipe as RecipeValue
    from lowbit.pipeline.straight import candidates, prepare, quantized_as

    target = targets.chosen(target_size, target_bits, target_kl, fit_memory, context, sensitivity)
    if target and calibration is None:
        calibration = "self"
    if keep is not None and target_format is None:
        raise RecipeError("--keep belongs to --as and would be ignored; leave it out")
    console.quiet()
    ready = prepare(model, recipe, target_format, calibrated=calibration is not None) if target_format else None
    wanted = RecipeValue.of(recipe) if ready is None else ready.recipe
    if calibration is not None:
        wanted = wanted.calibrated()
    elif wanted.needs_calibration is None and (samples is not None or chat):
        raise RecipeError(
            f"{wanted.title} uses no calibration text, so --samples and --chat would be ignored; add --calibration self"
        )
    if out is None:
        out = default_folder(model, wanted) if ready is None else default_file(model, recipe, ready.target)
    if card and text is not None:
        from lowbit.interchange.text import load_text

        load_text(text)  # a text that cannot be read is better known now than after the work
    screen = console.stderr() if as_json else console.stdout()
    screen.print(f"[bold]{_escaped(model)}[/bold]  {_escaped(wanted.title)}")
    if target:
        wanted = targets.allocated(
            model, wanted, target, sensitivity or out.with_name(out.name + ".sensitivity.json"), screen,
            calibration=calibration, samples=samples or SAMPLES, chat=chat, **(candidates(target_format, model) if target_format else {}),
        )  # fmt: skip
        ready = prepare(model, wanted, target_format) if target_format else None
    for instead, count in (ready.changes if ready else {}).items():
        screen.print(f"{instead} ({count} tensors)", style="dim", markup=False, highlight=False)
    start = time.perf_counter()
    with ExitStack() as ended:
        with console.layers_bar("quantizing") as (progress, on_layer):
            options: dict[str, Any] = {
                "progress": progress, "on_layer": on_layer, "overwrite": overwrite, "calibration": calibration,
                "samples": samples or SAMPLES, "chat": chat,
            }  # fmt: skip
            exported = None
            if ready is None:
                made = lowbit.quantize(model, wanted, out, **options)
            else:
                made, exported = ended.enter_context(quantized_as(model, ready, out, keep=keep, **options))
        seconds, peak = time.perf_counter() - start, peak_resident()
        screen.print(_written(made, out, seconds) if exported is None else f"{told(exported)}, in {seconds:.1f} s")
        result: dict[str, Any] = {
            "folder": str(out), "seconds": seconds, "peak_bytes": peak, "plan": _totals(made.plan),
        } | ({} if exported is None else {"exported": exported.to_json()})  # fmt: skip
        measured = None
        if card:
            try:
                measured = _measure(made, text, windows)
            except LowbitError as error:  # the model is written and whole; what it cost is another question
                console.stderr().print(f"not measured: {_escaped(str(error))}")
    if measured is not None:
        measured = replace(measured, parts=replace(measured.parts, quantize_seconds=seconds, quantize_peak=peak))
        result["card"] = measured.to_dict()
        if not as_json:
            from lowbit.report.panel import render_card

            screen.print(render_card(measured))
    if as_json:
        console.print_json(result)
    elif exported is None and _generates(made):
        screen.print(f'Try it:  lowbit generate {out} "{_PROMPT}"', style="dim", markup=False)


def default_file(model: str, recipe: str, kind: Target) -> Path:
    """`<model's own name>-<recipe as it was typed>` with the target's ending, in the current folder."""
    words = re.sub(r"[^A-Za-z0-9.]+", "-", recipe.removesuffix(".toml")).strip("-")
    return Path(f"{_base(model)}-{words}{kind.suffix or '-' + kind.name}")


def default_folder(model: str, recipe: RecipeValue) -> Path:
    """`<model's own name>-<recipe>` in the current folder."""
    words = re.sub(r"[^A-Za-z0-9.]+", "-", recipe.name or str(recipe)).strip("-")
    return Path(f"{_base(model)}-{words}")


def _base(model: str) -> str:
    path = Path(model)
    return (path.stem if path.suffix == ".gguf" else path.resolve().name if path.is_dir() else path.name) or "model"


def _measure(made: Any, text: str | None, windows: int) -> Any:
    import lowbit
    from lowbit.measure.speed import SHORT

    with console.count_bar("measuring quality", "windows", "measuring speed") as progress:
        return lowbit.evaluate(
            made, text=text, windows=windows, length=_LENGTH, speed=SHORT, prompt=_PROMPT, progress=progress
        )


def _written(made: Any, out: Path, seconds: float) -> str:
    from lowbit.pipeline.input_rules import inputs_text
    from lowbit.report.wording import bytes_text

    plan = made.plan
    speed = bytes_text(plan.bytes_before / max(seconds, 1e-9))
    counts, ranges = plan.input_counts(), made.report.ranges
    inputs = f"\ninputs: {_escaped(inputs_text(counts, ranges))}" if counts else ""
    return (
        f"{_escaped(str(out))}: {bytes_text(plan.bytes_before)} became {bytes_text(plan.output_bytes)} "
        f"({plan.bits_per_weight:.2f} bits per weight) in {seconds:.1f} s ({speed}/s){inputs}"
    )


def _generates(made: Any) -> bool:
    """Whether `lowbit generate` makes sense with the result."""
    from lowbit.interchange.inventory import model_class

    return made.source.config is not None and model_class(made.source.config).can_generate()


def _totals(plan: Any) -> dict[str, Any]:
    return {key: value for key, value in plan.to_json().items() if key != "tensors"}


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
