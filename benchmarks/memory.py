"""Peak memory of making and measuring a model, beside what the plan says.

    python benchmarks/memory.py MODEL... [--recipe w4] [--options=--data-free] [--windows 2] [--no-compare] [--work FOLDER]
        [--out FILE.json]

Checkpoints of 2.1 and 13.8 GB come from `synthetic_llama.py`.

For each MODEL, each in a fresh process: `lowbit quantize MODEL RECIPE` with its card, `lowbit evaluate --against MODEL`, and
`lowbit compare MODEL RECIPE`, both on as many windows. With --out the rows are added to those that FILE.json has, a model's in place of its
earlier ones, and the table is written beside it as FILE.md.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import transformers

import lowbit
from lowbit.interchange.files.undisturbed import temporary_folder
from lowbit.measure.environment import environment
from lowbit.measure.memory import PeakMemory, in_fresh_process

HEAD = """# Memory of making and measuring

Peaks of resident memory, Python and PyTorch included, each of a command in a fresh process. `quantize` is the whole command with its card;
the plan's figures stand beside it. `evaluate --against` and `compare` with the same recipe read as many windows of 1024 tokens as the table says.
"""


def measured(model: str, recipe: str, options: list[str], windows: int, work: Path, comparing: bool) -> dict[str, Any]:
    """One row of the table."""
    plan = lowbit.plan(model, recipe)
    out = str(work / "out")

    def run(*arguments: str) -> PeakMemory:
        done = in_fresh_process(["-m", "lowbit.cli", *arguments])
        print(f"{arguments[0]}: {done.bytes / 1e6:.0f} MB, {done.seconds:.0f} s", flush=True)
        return done

    few = ["--windows", str(windows)]
    made = run("quantize", model, recipe, *options, "-o", out, "--overwrite")
    evaluated = run("evaluate", out, "--against", model, *few)
    done = {"quantize": made, "evaluate": evaluated}
    if comparing:
        done["compare"] = run("compare", model, recipe, *options, *few, "--keep", str(work / "rows.json"))
    with_text = "--data-free" not in options and plan.calibrated_peak_bytes is not None
    planned = plan.calibrated_peak_bytes if with_text else plan.peak_bytes
    card = plan.card_peak_bytes or 0
    return {
        "model": Path(model).name, "parameters": plan.parameters, "file_bytes": plan.source_bytes, "recipe": recipe,
        "options": options, "windows": windows,
        "planned": {"quantizing": planned, "card": card, "command": max(planned or 0, card)},
        "peak": {name: each.bytes for name, each in done.items()}, "seconds": {name: each.seconds for name, each in done.items()},
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]], about: str) -> str:
    """The table as a page."""

    def mb(count: float) -> str:
        return f"{count / 1e6:,.0f} MB"

    lines = [
        "| model | file | command | `quantize`, with card | planned | measured / planned | `evaluate` | `compare` | windows | seconds |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        peak, planned = row["peak"], row["planned"]["command"]
        seconds = " + ".join(f"{row['seconds'][name]:.0f}" for name in row["seconds"])
        command = f"`{' '.join([row['recipe'], *row['options']])}`"
        lines.append(
            f"| {row['model']}, {row['parameters'] / 1e6:,.0f} M | {mb(row['file_bytes'])} | {command} | {mb(peak['quantize'])} | {mb(planned)} "
            f"| {peak['quantize'] / planned:.2f} | {mb(peak['evaluate'])} | {mb(peak['compare']) if 'compare' in peak else ''} | {row['windows']} | {seconds} |"
        )
    return HEAD + "\n" + "\n".join(lines) + f"\n\n{about}\nMade by `benchmarks/memory.py`.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--recipe", default="w4")
    parser.add_argument("--options", default="--data-free", help="of quantize and compare, separated by spaces")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument(
        "--no-compare", dest="comparing", action="store_false", help="leave `compare` out, for models that take long"
    )
    parser.add_argument("--work", type=Path, help="where results are written; a temporary folder when it is left out")
    parser.add_argument("--note", default="", help="a sentence for the page, such as what ran beside")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    here = environment()
    about = (
        f"On {here.machine}; torch {here.torch}, transformers {transformers.__version__}, Python {platform.python_version()}, "
        f"lowbit {here.lowbit}. {arguments.note}".rstrip()
    )
    before = json.loads(arguments.out.read_text())["rows"] if arguments.out and arguments.out.exists() else []
    rows = {(row["model"], row["recipe"], *row["options"]): row for row in before}
    for model in arguments.models:
        with temporary_folder(place=arguments.work) as work:
            row = measured(
                model, arguments.recipe, arguments.options.split(), arguments.windows, work, arguments.comparing
            )
        rows[row["model"], row["recipe"], *row["options"]] = row
        found = sorted(rows.values(), key=lambda each: each["file_bytes"])
        if arguments.out:
            arguments.out.write_text(json.dumps({"about": about, "rows": found}, indent=2) + "\n")
            arguments.out.with_suffix(".md").write_text(markdown(found, about))
    print(markdown(list(rows.values()), about))


if __name__ == "__main__":
    main()
