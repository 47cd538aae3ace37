"""lowbit merge"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli import console
from lowbit.cli.card_option import CardOption, CommandWithCard, HowMuch, NoCard, how_much
from lowbit.cli.help import OUTPUT
from lowbit.cli.job import Outcome
from lowbit.cli.kept_card import keep_card, merge_words
from lowbit.cli.options import Calibration, Chat, DataFree, Effort, Json, Overwrite, Samples, rung_of
from lowbit.cli.quantize import measured_after, whole

if TYPE_CHECKING:
    from lowbit.pipeline.api import Quantized


def register(app: typer.Typer) -> None:
    app.command(
        cls=CommandWithCard,
        rich_help_panel="Make",
        short_help="Put a LoRA adapter into the weights of a model.",
        epilog="Examples:\nlowbit merge smollm2-w4 my-adapter -o merged\nlowbit merge smollm2 my-adapter w4 -o merged-w4\n"
        "lowbit merge smollm2-w4 my-adapter -o merged-float --dtype bfloat16",
    )(merge)


def merge(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE",
            help="The model that the adapter was trained on: a folder of lowbit, a float model, or one that another program quantized.",
            show_default=False,
        ),
    ],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder that peft wrote.", show_default=False)],
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="Quantize the result by this recipe. When it is left out, a folder of lowbit is quantized again by the recipe and on the "
            "calibration text that it was made with, and a float model stays float.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Write this folder.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Write float weights, in float32, bfloat16 or float16, whatever BASE is.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    effort: Effort = "auto",
    data_free: DataFree = False,
    calibration: Calibration = None,
    samples: Samples = None,
    chat: Chat = False,
    card: CardOption = HowMuch.quick,
    no_card: NoCard = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Put a LoRA adapter into the weights of a model, tensor by tensor. peft is not needed.

    A quantized BASE is dequantized, and the sum is quantized again. An adapter that was trained on the float model loses least where BASE is that
    float model and a RECIPE is named; one that was trained on a quantized model belongs to that model. What the merge cost is measured against BASE with
    the adapter in float.
    """
    import lowbit
    from lowbit.convert.dequantizing import Dequantized
    from lowbit.measure.advice import advice
    from lowbit.measure.memory import peak_resident
    from lowbit.report.panel import render_card
    from lowbit.report.results_view import dequantized_text

    measures = how_much(card, no_card)
    console.quiet()
    rung = rung_of(effort, data_free)
    start = time.perf_counter()
    with console.layers_bar("merging") as (progress, on_layer):
        made = lowbit.merge(
            base, adapter, out, recipe, dtype=dtype, effort=rung, calibration=calibration, samples=samples, chat=chat, progress=progress,
            on_layer=on_layer, overwrite=overwrite,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    screen = console.stderr() if as_json else console.stdout()
    facts: dict[str, Any] = {"folder": str(out), "seconds": seconds}
    if isinstance(made, Dequantized):
        for line in dequantized_text(made).splitlines():
            console.say(screen, line)
        facts |= {"dtype": str(made.dtype).removeprefix("torch."), "bytes": made.bytes, "notes": list(made.notes)}
    else:
        for line in _lines(made, out, seconds):
            console.say(screen, line)
        facts |= {"recipe": str(made.plan.recipe), "bytes": made.plan.output_bytes, "notes": list(made.plan.notes)}
        done = Outcome(made, None, seconds, peak_resident())
        found = None
        if measures is not HowMuch.none:
            with whole():
                found = measured_after(done, None, None, measures)
        command = merge_words(base, adapter, recipe, dtype, effort, calibration, samples, chat, str(out))
        for line in keep_card(done, out, None, base, command, found):
            console.dim(line)
        if found is not None:
            facts["card"] = found.to_dict()
            if not as_json:
                screen.print(render_card(found, advice(found, None)))
    if as_json:
        console.print_json(facts)


def _lines(made: Quantized, out: Path, seconds: float) -> list[str]:
    from lowbit.report.wording import bits_text, bytes_text

    plan = made.plan
    bits = bits_text(plan.linear_bits_per_weight, plan.bits_per_weight, plan.embed_bits_per_weight)
    return [
        f"{out}: {bytes_text(plan.output_bytes)}, quantized by {plan.recipe.title} in {seconds:.1f} s",
        f"bits per weight: {bits}",
        *plan.notes,
    ]
