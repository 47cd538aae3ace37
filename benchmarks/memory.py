"""Peak memory of making and measuring a model, beside what the plan says.

    python benchmarks/memory.py MODEL... [--recipe w4] [--options=--data-free] [--windows 2] [--work FOLDER] [--out FILE.json]
    python benchmarks/memory.py --make FOLDER --layers 35            # writes a checkpoint of random values first, of 13 GB with 35 layers

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

import torch
import transformers
from transformers import LlamaConfig

import lowbit
from lowbit.interchange.files.safetensors_reader import bytes_of
from lowbit.interchange.files.safetensors_writer import INDEX, create, index_json, shards_of
from lowbit.interchange.files.undisturbed import temporary_folder
from lowbit.interchange.hf.models import meta_model
from lowbit.interchange.hub.smollm2 import open_model
from lowbit.measure.environment import environment
from lowbit.measure.memory import PeakMemory, in_fresh_process

HEAD = """# Memory of making and measuring

Peaks of resident memory, Python and PyTorch included, each of a command in a fresh process. `quantize` is the whole command with its card;
the plan's figures stand beside it. `evaluate --against` and `compare` with the same recipe read as many windows of 1024 tokens as the table says.
"""


def write_checkpoint(folder: Path, layers: int) -> None:
    """A Llama-shaped checkpoint (hidden 4096, MLP 11008, bfloat16) of random weights, one tensor in memory at a time, with SmolLM2's tokenizer."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=49152, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    open_model("smollm2", None).tokenizer().save_pretrained(folder)
    shapes = {name: tuple(p.shape) for name, p in meta_model(config).state_dict().items()}
    shards = shards_of([(name, {name: (torch.bfloat16, shape)}) for name, shape in shapes.items()], 2_000_000_000)
    create(folder, shards)
    generator = torch.Generator().manual_seed(0)
    for shard in shards:
        with (folder / shard.file).open("r+b") as file:
            for name, (begin, _) in shard.spans.items():
                file.seek(begin)
                file.write(bytes_of(torch.randn(shapes[name], generator=generator).mul_(0.02).to(torch.bfloat16)))
    (folder / INDEX).write_bytes(index_json(shards))


def measured(model: str, recipe: str, options: list[str], windows: int, work: Path) -> dict[str, Any]:
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
    compared = run("compare", model, recipe, *options, *few, "--keep", str(work / "rows.json"))
    with_text = "--data-free" not in options and plan.calibrated_peak_bytes is not None
    planned = plan.calibrated_peak_bytes if with_text else plan.peak_bytes
    card = plan.card_peak_bytes or 0
    return {
        "model": Path(model).name, "parameters": plan.parameters, "file_bytes": plan.source_bytes, "recipe": recipe,
        "options": options, "windows": windows,
        "planned": {"quantizing": planned, "card": card, "command": max(planned or 0, card)},
        "peak": {"quantize": made.bytes, "evaluate": evaluated.bytes, "compare": compared.bytes},
        "seconds": {"quantize": made.seconds, "evaluate": evaluated.seconds, "compare": compared.seconds},
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
        seconds = " + ".join(f"{row['seconds'][name]:.0f}" for name in ("quantize", "evaluate", "compare"))
        command = f"`{' '.join([row['recipe'], *row['options']])}`"
        lines.append(
            f"| {row['model']}, {row['parameters'] / 1e6:,.0f} M | {mb(row['file_bytes'])} | {command} | {mb(peak['quantize'])} | {mb(planned)} "
            f"| {peak['quantize'] / planned:.2f} | {mb(peak['evaluate'])} | {mb(peak['compare'])} | {row['windows']} | {seconds} |"
        )
    return HEAD + "\n" + "\n".join(lines) + f"\n\n{about}\nMade by `benchmarks/memory.py`.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--recipe", default="w4")
    parser.add_argument("--options", default="--data-free", help="of quantize and compare, separated by spaces")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where results are written; a temporary folder when it is left out")
    parser.add_argument(
        "--make", type=Path, metavar="FOLDER", help="write a checkpoint there, unless it is there, and measure it too"
    )
    parser.add_argument("--layers", type=int, default=35)
    parser.add_argument("--note", default="", help="a sentence for the page, such as what ran beside")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    models = list(arguments.models)
    if arguments.make is not None:
        if not arguments.make.exists():
            write_checkpoint(arguments.make, arguments.layers)
        models.append(str(arguments.make))
    here = environment()
    about = (
        f"On {here.machine}; torch {here.torch}, transformers {transformers.__version__}, Python {platform.python_version()}, "
        f"lowbit {here.lowbit}. {arguments.note}".rstrip()
    )
    before = json.loads(arguments.out.read_text())["rows"] if arguments.out and arguments.out.exists() else []
    rows = {(row["model"], row["recipe"], *row["options"]): row for row in before}
    for model in models:
        with temporary_folder(place=arguments.work) as work:
            row = measured(model, arguments.recipe, arguments.options.split(), arguments.windows, work)
        rows[row["model"], row["recipe"], *row["options"]] = row
        found = sorted(rows.values(), key=lambda each: each["file_bytes"])
        if arguments.out:
            arguments.out.write_text(json.dumps({"about": about, "rows": found}, indent=2) + "\n")
            arguments.out.with_suffix(".md").write_text(markdown(found, about))
    print(markdown(list(rows.values()), about))


if __name__ == "__main__":
    main()
