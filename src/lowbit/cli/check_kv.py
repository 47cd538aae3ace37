"""lowbit check-kv"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli import console
from lowbit.cli.help import MEASURING, OUTPUT
from lowbit.cli.options import Json, Model, Text


def register(app: typer.Typer) -> None:
    app.command(
        "check-kv",
        rich_help_panel="Measure",
        short_help="Measure what a KV cache in few bits costs, and find a safe one.",
        epilog="Examples:\nlowbit check-kv smollm2-w4\nlowbit check-kv smollm2 --kv int4:g32 --context 8192 --plot drift.png\n"
        "lowbit check-kv smollm2-w4 --kl 0.03 --write",
    )(check_kv)


def check_kv(
    model: Model,
    kv: Annotated[
        list[str] | None,
        typer.Option(
            "--kv",
            metavar="FORMAT",
            help="Measure this cache format, such as int8, k=int8,v=int4:g32 or kivi2; give it again for another. When it is left out, some usual "
            "ones are measured.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Measure on contexts of N tokens; 4096 when it is left out, or what the model and the text have where that is less.",
            show_default=False,
            rich_help_panel=MEASURING,
        ),
    ] = None,
    text: Text = None,
    windows: Annotated[
        int, typer.Option(min=1, metavar="N", help="Use the first N contexts of the text.", rich_help_panel=MEASURING)
    ] = 2,
    kl: Annotated[
        float,
        typer.Option(
            "--kl",
            metavar="KL",
            help="Recommend the fewest bits with at most this KL divergence from the float cache, in nats per token.",
        ),
    ] = 0.01,
    recommend: Annotated[
        bool,
        typer.Option(
            "--recommend/--no-recommend",
            help="Also measure the keys and the values of each layer, and find what to use. It takes most of the time.",
        ),
    ] = True,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also draw the divergence by position into this file, which needs matplotlib.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    write: Annotated[
        bool,
        typer.Option(
            "--write",
            help="Write the recommended format into MODEL, a folder of lowbit, which is then run with it.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure what storing keys and values in few bits costs a model over a long context, beside its float cache.

    Each cache format is measured by its divergence from the float cache along the context, by facts that are planted at several depths and
    asked at the end, and by a random sequence that comes again. Then the keys and the values of each layer are measured alone, and the fewest bits
    within --kl are found and measured as a whole.
    """
    import lowbit
    from lowbit.errors import RecipeError
    from lowbit.interchange.files.settings import is_ours

    if write and not recommend:
        raise RecipeError("--write writes what is recommended; leave --no-recommend out")
    if write and not is_ours(Path(model)):
        raise RecipeError(
            f"--write is for a folder that lowbit quantized, and {model} is none; quantize it with kv=auto"
        )
    if plot is not None:
        from lowbit.report.plots import require

        require()
    console.quiet()
    with console.steps() as (say, progress):
        found = lowbit.check_kv(
            model,
            kv or None,
            text,
            context=context,
            windows=windows,
            kl=kl,
            recommend=recommend,
            progress=progress,
            told=say,
        )
    from lowbit.report.cache_view import render_cache_check

    console.print_result(as_json, found.to_json, lambda width: render_cache_check(found, width=width))
    if plot is not None:
        from lowbit.report.cache_plot import draw_drift
        from lowbit.report.plots import save_figure

        console.dim(f"the drift curve is in {save_figure(draw_drift(found), plot)}")
    if write and found.recommended is not None:
        _write(Path(model), found.recommended.format)


def _write(folder: Path, fmt: str) -> None:
    """The recommended format into a folder."""
    from lowbit.kv import CacheFormat
    from lowbit.kv.folder import write_cache_format
    from lowbit.report.card import keep_cache

    write_cache_format(folder, CacheFormat.of(fmt))
    for line in keep_cache(folder):
        console.dim(line)
    console.dim(f"{folder} now carries this cache format, and is run with it where nothing else is said")
