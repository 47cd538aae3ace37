"""lowbit import"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli import console
from lowbit.cli.kept_card import keep_imported
from lowbit.cli.options import Json, Model, Overwrite

if TYPE_CHECKING:
    from lowbit.pipeline.api import Quantized


def register(app: typer.Typer) -> None:
    app.command(
        "import",
        rich_help_panel="Convert",
        short_help="Take over a model that another program quantized.",
        epilog="Example:  lowbit import Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int4 -o qwen-int4",
    )(import_)


def import_(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Write this folder.", show_default=False)],
    rest: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="Store weights that no format of lowbit holds exactly in this format; the word keep leaves them float.",
        ),
    ] = "keep",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a model that another program quantized as a folder of lowbit, with the very same integers and scales.

    GPTQ, AWQ, compressed-tensors, bitsandbytes, FP8, MXFP4 and GGUF are read. Nothing is rounded again; what could not be kept is
    named with its loss.
    """
    import lowbit

    console.quiet()
    start = time.perf_counter()
    with console.bytes_bar("importing") as progress:
        made = lowbit.import_model(model, out, rest=rest, progress=progress, overwrite=overwrite)
    said = keep_imported(made, out, model)
    facts = summary(made) | {"folder": str(out), "seconds": time.perf_counter() - start}
    for line in said:
        console.dim(line)
    if as_json:
        console.print_json(facts)
        return
    screen = console.stdout()
    for line in _lines(made, facts):
        screen.print(line, markup=False, highlight=False, soft_wrap=True)


def summary(made: Quantized) -> dict[str, Any]:
    """What was kept exactly, in which formats, and what everything else cost: by reason, the largest relative error."""
    exact: Counter[str] = Counter()
    others: dict[str, dict[str, Any]] = {}
    for layer in made.report.layers:
        if layer.format is not None and layer.error == 0.0 and "quantized anew" not in layer.note:
            exact[layer.format] += 1
        elif layer.format is not None or layer.error > 0.0 or layer.note:
            reason = layer.note or layer.keep or ""
            entry = others.setdefault(reason, {"tensors": 0, "format": layer.format or "float", "error": 0.0})
            entry["tensors"] += 1
            entry["error"] = max(entry["error"], layer.error)
    notes = Counter(
        layer.note for layer in made.report.layers if layer.format is not None and layer.error == 0.0 and layer.note
    )
    return {
        "source": made.source.storage, "exact": dict(exact.most_common()), "others": others, "notes": dict(notes),
        "bytes": made.plan.output_bytes, "bits_per_weight": made.plan.bits_per_weight,
        "left_out": left_out_of(made),
    }  # fmt: skip


def _lines(made: Quantized, facts: dict[str, Any]) -> list[str]:
    from lowbit.report.wording import bytes_text

    count = sum(facts["exact"].values())
    formats = ", ".join(f"{n} {fmt}" for fmt, n in facts["exact"].items())
    lines = [
        f"{facts['folder']}: {bytes_text(made.plan.source_bytes or 0)} of {facts['source']} became {bytes_text(facts['bytes'])} "
        f"({facts['bits_per_weight']:.2f} bits per weight) in {facts['seconds']:.1f} s",
        f"{count} tensors with the very same integers and scales, loss 0: {formats}" if count else "no tensor could be kept as it is",
    ]  # fmt: skip
    for reason, entry in facts["others"].items():
        lines.append(
            f"{entry['tensors']} tensors as {entry['format']}, relative error up to {entry['error']:.2g}: {reason}"
        )
    return lines + [f"{n} tensors: {note}" for note, n in facts["notes"].items()] + facts["left_out"]


def left_out_of(made: Quantized) -> list[str]:
    """What of the source is not in the folder: tensors, then files, a sentence for each reason."""
    return [*map(str, made.source.left_out), *made.source.left_files()]
