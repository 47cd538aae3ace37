"""lowbit quantize"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli import budgets, console
from lowbit.cli.card_option import LEAST, CardOption, CommandWithCard, HowMuch, NoCard, how_much
from lowbit.cli.export import summary
from lowbit.cli.help import PROGRAMS
from lowbit.cli.importing import left_out_of
from lowbit.cli.job import CalibrationText, Job, Outcome
from lowbit.cli.kept_card import keep_card, words_of
from lowbit.cli.options import (
    KV,
    Adapter,
    Bits,
    Calibration,
    CardWindows,
    Chat,
    Context,
    DataFree,
    Effort,
    FitMemory,
    GroupSize,
    Json,
    Model,
    Overwrite,
    QuantizeAs,
    RecipeOrBits,
    Samples,
    SensitivityFile,
    TargetBits,
    TargetKL,
    TargetSize,
    Text,
    recipe_of,
    rung_of,
)  # fmt: skip

if TYPE_CHECKING:
    from lowbit.measure.card import Card

_PROMPT = "What is the capital of France?"
_LENGTH, _WINDOWS = 1024, 4  # of the text, for --card full
_WRITES = "a target measures each layer on text, that which comes with lowbit; --calibration FILE gives it yours"
_WARNED = 5  # tensors that are named one by one


def register(app: typer.Typer) -> None:
    app.command(
        cls=CommandWithCard,
        rich_help_panel="Make",
        short_help="Make a model small, and measure what that cost.",
        epilog="Examples:\nlowbit quantize smollm2\nlowbit quantize smollm2 w4 --calibration self -o small\n"
        "lowbit quantize smollm2 w4 --target-size 80MB\nlowbit quantize smollm2 q4_k_m --as gguf -o small.gguf",
    )(quantize)


def quantize(
    model: Model,
    recipe: RecipeOrBits = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="Write here; MODEL-RECIPE in this folder when it is left out.",
            show_default=False,
        ),
    ] = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    adapter: Adapter = None,
    target_format: QuantizeAs = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep",
            metavar="PATH",
            help="With --as, also keep lowbit's own folder, under this name.",
            show_default=False,
            rich_help_panel=PROGRAMS,
        ),
    ] = None,
    kv: KV = None,
    effort: Effort = "auto",
    data_free: DataFree = False,
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
    windows: CardWindows = None,
    card: CardOption = HowMuch.quick,
    no_card: NoCard = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make a model small, read the result back, and measure what that cost.

    Without a RECIPE it is w4: 4.5 bits in the linear layers and 8 in the embedding, calibrated on a text that comes with lowbit.
    """
    from lowbit.calibration.package_text import BUILTIN
    from lowbit.errors import RecipeError
    from lowbit.report.effort_view import cache_line, decision_lines, peak_line
    from lowbit.report.layout import headline

    typed = recipe_of(recipe, bits, group_size)
    target = budgets.chosen(target_size, target_bits, target_kl, fit_memory, context, sensitivity)
    if keep is not None and target_format is None:
        raise RecipeError("--keep belongs to --as and would be ignored; leave it out")
    if kv is not None and target_format is None:
        raise RecipeError("--kv belongs to --as vllm and would be ignored; leave it out")
    measures = how_much(card, no_card)
    console.quiet()
    effort = rung_of(effort, data_free)
    told = bool(target) and calibration is None
    text_of = CalibrationText(BUILTIN if told else calibration, samples, chat)
    job = Job.of(
        model, typed, target_format, text_of, kv, effort, keep or out, forecast=not target, overwrite=overwrite,
        adapter=adapter,
    )  # fmt: skip
    plain = out or job.default_out()  # its sensitivity serves every target
    out = out or job.default_out(budgets.in_a_name(target))
    if measures is not HowMuch.none and text is not None:
        from lowbit.calibration.text import load_text

        load_text(text)  # a text that cannot be read is better known now than after the work
    screen = console.stderr() if as_json else console.stdout()
    screen.print(headline(model if adapter is None else f"{model} with {adapter}", job.recipe.title, screen.width))
    for line in job.advice():
        screen.print(f"note: {line}", style="dim", markup=False, highlight=False)
    for line in decision_lines(job.decision):
        console.say(screen, line, style="dim")
    peak = None if target else job.peak(measures is not HowMuch.none)
    if peak is not None:
        console.say(screen, peak_line(peak, measures is not HowMuch.none), style="dim")
    if (later := cache_line(job.recipe)) is not None:
        console.say(screen, later, style="dim")
    kept = None
    if target:
        if told and sensitivity is None:
            console.dim(_WRITES)
        kept = sensitivity or plain.with_name(plain.name + ".sensitivity.json")
        with _noted(kept):
            job = job.allocated(target, kept, screen)
    for instead, count in (job.ready.changes if job.ready else {}).items():
        console.say(screen, f"{instead} ({count} tensors)", style="dim")
    how = measures.value if measures is HowMuch.full else None
    command = " ".join(
        words_of(
            model, job.typed, target_format, effort, calibration, samples, chat, target, text, windows, how, adapter
        )
    )
    with _noted(kept), job.run(out, keep, overwrite) as made:
        console.say(screen, _written(made, out))
        measured = None
        if measures is not HowMuch.none:
            from lowbit.report import card as cards

            place = keep if made.exported is not None else out
            if made.checked and place is not None:
                measured = cards.measured_before(
                    place, text, _asked(measures, windows, made), _LENGTH, quick=measures is HowMuch.quick
                )
            if measured is not None:
                console.say(screen, "measured before, on the same text; what the card in the folder says:", style="dim")
            else:
                with whole():
                    measured = measured_after(made, text, _asked(measures, windows, made), measures)
        said = keep_card(made, out, keep, model, command, measured)
    for line in said:
        console.dim(line)
    if as_json:
        console.print_json(_plain(made, out, measured))
        return
    if measured is not None:
        from lowbit.measure.advice import advice
        from lowbit.report.panel import render_card

        base = model if made.quantized.source.config is not None else None
        more = advice(measured, base, job.ready.exporter.name if job.ready else "lowbit")
        if adapter is not None:
            more = tuple(replace(each, command=(*each.command, "--adapter", adapter)) for each in more)
        screen.print(render_card(measured, more))
    if made.exported is None:
        screen.print(f"Try it:  {_trial(made.quantized, out)}", style="dim", markup=False, soft_wrap=True)


@contextmanager
def _noted(sensitivity: Path | None) -> Iterator[None]:
    """An error notes that the measured sensitivity is kept, where there is one, and an interruption that it is not, where it is not whole."""
    try:
        yield
    except BaseException as error:
        if sensitivity is not None and sensitivity.is_file():
            error.add_note(f"{sensitivity} keeps the sensitivity, which the same command reads again")
        elif sensitivity is not None and isinstance(error, KeyboardInterrupt):
            error.add_note("the sensitivity was not measured to its end, and nothing of it is kept")
        raise


@contextmanager
def whole() -> Iterator[None]:
    """An interruption says that the result is there."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note("the result is written and whole; only its card is missing")
        raise


def _asked(measures: HowMuch, windows: int | None, made: Outcome) -> int | None:
    """How many windows are to be measured; None for as many as there is time for, or as the model's task takes."""
    from lowbit.measure.output_card import compares_outputs

    full = windows is None and measures is HowMuch.full and not compares_outputs(made.quantized.source)
    return _WINDOWS if full else windows


def measured_after(made: Outcome, text: str | None, windows: int | None, measures: HowMuch) -> Card | None:
    """What the result cost, None where it cannot be measured: it is written and whole, whatever happens here."""
    import lowbit
    from lowbit.errors import LowbitError
    from lowbit.measure.kept import place_of
    from lowbit.measure.speed import SHORT

    seconds = max(LEAST, made.seconds)
    how: dict[str, Any] = {"speed": SHORT} if measures is HowMuch.full else {"budget": seconds}
    if measures is HowMuch.quick:
        said = f"measuring what that cost, in about {seconds:.0f} s where that is possible; --card full measures more, and --no-card nothing"
        console.say(console.stderr(), said, style="dim")
    try:
        with console.steps() as (say, progress):
            card = lowbit.evaluate(
                made.quantized,
                text=text,
                windows=windows,
                prompt=_PROMPT,
                keep=None if made.quantized.folder is None else place_of(made.quantized.folder),
                progress=progress,
                told=say,
                **how,
            )
    except Exception as error:
        kind = "" if isinstance(error, LowbitError) else f"{type(error).__name__}: "
        console.stderr().print(f"not measured: {kind}{console.escaped(str(error))}")
        return None
    if made.checked:  # what quantizing took is known to the card that the folder has, if any
        return card
    return replace(card, parts=replace(card.parts, quantize_seconds=made.seconds, quantize_peak=made.peak_bytes))


def _plain(made: Outcome, out: Path, card: Card | None) -> dict[str, Any]:
    """For --json."""
    found: dict[str, Any] = {
        "folder": str(out), "already_done": made.checked, "seconds": made.seconds, "peak_bytes": made.peak_bytes, "plan": _totals(made.quantized.plan),
        "left_out": left_out_of(made.quantized),
    }  # fmt: skip
    if made.quantized.report.warnings:
        found["warnings"] = made.quantized.report.warnings
    if made.exported is not None:
        found["exported"] = made.exported.to_json()
    if card is not None:
        found["card"] = card.to_dict()
    return found


def _written(made: Outcome, out: Path) -> str:
    from lowbit.recipes.activation_rules import inputs_text
    from lowbit.report.wording import bits_text, bytes_text

    said = "".join(f"\n{line}" for line in (*left_out_of(made.quantized), *_warned(made.quantized.report.warnings)))
    if made.exported is not None:
        return f"{summary(made.exported)}, in {made.seconds:.1f} s{said}"
    plan = made.quantized.plan
    speed = f" in {made.seconds:.1f} s ({bytes_text(plan.bytes_before / max(made.seconds, 1e-9))}/s)"
    if made.checked:
        speed = f"; checked in {made.seconds:.1f} s"
    counts, ranges = plan.input_counts(), made.quantized.report.ranges
    inputs = f"\ninputs: {inputs_text(counts, ranges)}" if counts else ""
    cache = made.quantized.cache
    stored = "" if cache is None else f"\nKV cache: {cache}, {bytes_text(plan.kv_bytes_per_token)} a token"
    return (
        f"{out}: {bytes_text(plan.bytes_before)} became {bytes_text(plan.output_bytes)}{speed}\n"
        f"bits per weight: {bits_text(plan.linear_bits_per_weight, plan.bits_per_weight, plan.embed_bits_per_weight)}{inputs}{stored}{said}"
    )


def _warned(warnings: Mapping[str, str]) -> list[str]:
    """Lines about single tensors; of many, the first few and how many more."""
    lines = [f"warning: {name}: {text}" for name, text in warnings.items()]
    more = len(lines) - _WARNED
    return lines if more <= 0 else [*lines[:_WARNED], f"warning: and {more} more tensors; lowbit.json names all"]


def _trial(made: Any, out: Path) -> str:
    """How the result is tried: text is asked for where it answers, and it is loaded in Python where it does not."""
    from lowbit.interchange.hf.models import model_class

    kind = None if made.source.config is None else model_class(made.source.config)
    if kind is not None and kind.can_generate() and kind.main_input_name == "input_ids":
        return f'lowbit generate {shlex.quote(str(out))} "{_PROMPT}"'
    if (out / "modules.json").is_file():
        return (
            f"import lowbit; from sentence_transformers import SentenceTransformer; SentenceTransformer({str(out)!r})"
        )
    return f"import lowbit; model = lowbit.load({str(out)!r})"


def _totals(plan: Any) -> dict[str, Any]:
    return {key: value for key, value in plan.to_json().items() if key != "tensors"}
