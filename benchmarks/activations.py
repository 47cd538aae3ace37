"""Why int8 inputs cost what they cost: KL by how inputs are cut into blocks, and how massive a few inputs are.

    python benchmarks/activations.py MODEL EVAL --out benchmarks/results/activations.md [--windows 4]

Weights are `absmax@int8:channel` in every row, so that only the inputs differ; the first row leaves them in float.
The second table is of the float model: for each kind of layer, the largest |x| over all tokens and channels beside the
median over tokens of a token's largest |x|, and beside the root mean square.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

import lowbit
from lowbit.calibration.text import load_text
from lowbit.interchange.opening import open_source
from lowbit.measure.quality import Reference, measure_quality
from lowbit.measure.windows import Windows, make_windows

WEIGHTS = "absmax@int8:channel"
INPUTS = ("", "uint8:g64:asym", "int8:g64", "int8:g128", "int8:token:outliers=6", "int8:token", "int8:tensor")
TENSOR = "absmax@int8:tensor,a=int8:tensor"  # what PyTorch's quantize_dynamic does by default, but for its zero-points


def massive(model: torch.nn.Module, windows: Windows) -> list[str]:
    """Markdown rows: largest input, median largest of a token, root mean square; by kind of layer."""
    largest: defaultdict[str, list[float]] = defaultdict(list)
    by_token: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
    squares: defaultdict[str, list[float]] = defaultdict(list)

    def hook(name: str):
        def see(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            tokens = x.abs().amax(1)
            largest[name].append(float(tokens.max()))
            by_token[name].append(tokens)
            squares[name].append(float(x.square().mean()))

        return see

    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and re.search(r"\.\d+\.", n)]
    hooks = [m.register_forward_pre_hook(hook(re.sub(r".*\.\d+\.", "", n))) for n, m in linear]
    with torch.no_grad():
        for ids in windows.ids:
            model(ids[None])
    for h in hooks:
        h.remove()
    rows = []
    for name in largest:
        median = float(torch.cat(by_token[name]).median())
        rms = (sum(squares[name]) / len(squares[name])) ** 0.5
        rows.append(
            f"| {name} | {max(largest[name]):.1f} | {median:.2f} | {rms:.3f} | {max(largest[name]) / median:.0f} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("evaluation")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    source = open_source(arguments.model)
    windows = make_windows(load_text(arguments.evaluation), source.tokenizer(), limit=arguments.windows)
    model = source.load_float()
    reference = Reference(model, windows, 4 << 30)
    lines = ["| weights | inputs | KL | ± | top-1 % |", "| --- | --- | --: | --: | --: |"]
    for recipe in [WEIGHTS + (f",a={a}" if a else "") for a in INPUTS] + [TENSOR]:
        with tempfile.TemporaryDirectory(prefix="lowbit-bench-") as room:
            lowbit.quantize(arguments.model, recipe, Path(room) / "out")
            quality = measure_quality(lowbit.load(Path(room) / "out", dtype=torch.float32), windows, base=reference)
        assert quality.kl_mean and quality.top1
        weights, _, inputs = recipe.partition(",a=")
        kl = quality.kl_mean
        row = f"| `{weights}` | {f'`{inputs}`' if inputs else 'float'} | {kl.value:.4f} | {kl.stderr:.4f} | {100 * quality.top1.value:.2f} |"
        print(row, file=sys.stderr, flush=True)
        lines.append(row)
    lines += ["", "| input of | largest | median largest of a token | root mean square | largest / median |"]
    lines += ["| --- | --: | --: | --: | --: |", *massive(model, windows)]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    # What is written by hand below the tables stays.
    told = arguments.out.read_text().partition("\n## ") if arguments.out.exists() else ("", "", "")
    tables = f"{arguments.windows} windows of 1024 tokens\n\n" + "\n".join(lines) + "\n"
    arguments.out.write_text(tables + told[1] + told[2])
    print("\n".join(lines))


if __name__ == "__main__":
    main()
