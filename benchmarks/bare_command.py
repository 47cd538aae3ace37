"""What a person who types the bare command gets: seconds and peak memory by the clock of the outside, the forecast, and the loss on three
kinds of text, none of which the model was calibrated on unless a row says so.

    python benchmarks/bare_command.py MODEL EVAL --out benchmarks/results/bare-command.json [--windows 24] [--calibration FILE]
        [--row "w4 --data-free" ...] [--peer FOLDER ...]

Rows are the words after `lowbit quantize MODEL`; each is run in a process of its own with `--no-card`. The kinds of text: EVAL (such as
WikiText-2), Python's own manual, and source code of its library. KL(float || quantized) in nats per token over windows of 1024 tokens, in float32.
A FOLDER is what an adapter of `peers/` left: its seconds are those of its result, and its weights are judged as they are.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from asyncio import base_events
from json import decoder
from pathlib import Path
from typing import Any

import torch

import lowbit
from lowbit.calibration.text import load_text
from lowbit.interchange.opening import open_source
from lowbit.measure.environment import environment
from lowbit.measure.quality import Reference, measure_quality
from lowbit.measure.windows import make_windows

ROWS = ("", "w4 --data-free", "w4 --effort low", "nl4")


def run(model: str, words: str, out: Path) -> dict[str, Any]:
    """Quantize by the command that a person types."""
    command = [
        sys.executable, "-m", "lowbit.cli", "quantize", model, *words.split(), "-o", str(out), "--no-card", "--json",
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words}: {done.stderr.strip()}")
    wall, told = time.perf_counter() - start, json.loads(done.stdout)
    said = re.search(r"Takes\s+about\s+(\d+)\s+(s|min)\s+here", done.stderr)
    forecast = None if said is None else int(said[1]) * (60 if said[2] == "min" else 1)
    return {
        "words": words, "recipe": told["plan"]["recipe"], "process_seconds": round(wall, 1), "seconds": round(told["seconds"], 1),
        "forecast": forecast, "peak_mb": round(told["peak_bytes"] / 1e6), "linear_bits": round(told["plan"]["linear_bits_per_weight"], 3),
    }  # fmt: skip


def peer(folder: Path) -> dict[str, Any]:
    """What an adapter of `peers/` said of its run, in the fields of a row."""
    told = json.loads((folder / "result.json").read_text())
    seconds = round(told["seconds"], 1)
    return {
        "words": f"{told['peer']} {told['config']}", "recipe": "", "peer": str(folder / told["weights"]), "process_seconds": seconds,
        "seconds": seconds, "forecast": None, "peak_mb": round(told["peak_resident_bytes"] / 1e6),
        "linear_bits": round(told["linear_bits"], 3),
    }  # fmt: skip


def kinds(evaluation: str) -> dict[str, Any]:
    code = "\n\n".join(Path(str(module.__file__)).read_text() for module in (difflib, argparse, base_events, decoder))
    return {"text": evaluation, "manual": None, "code": [code]}


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| `lowbit quantize MODEL` … | recipe | linear bits | forecast s | quantizing s | whole process s | peak MB | KL text | KL manual | KL code |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for r in rows:
        kl = (
            " | ".join(f"{r['kl'][kind][0]:.4f} ± {r['kl'][kind][1]:.4f}" for kind in ("text", "manual", "code"))
            if r.get("kl")
            else " |  | "
        )
        words = r["words"] if "peer" in r else f"`{r['words']}`" if r["words"] else "(nothing more)"
        lines.append(
            f"| {words} | `{r['recipe']}` | {r['linear_bits']} | {r['forecast'] or ''} | {r['seconds']} | {r['process_seconds']} | "
            f"{r['peak_mb']} | {kl} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("evaluation")
    parser.add_argument("--row", action="append")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--calibration", help="also calibrated on this file, for comparison")
    parser.add_argument("--peer", type=Path, action="append", default=[], help="what an adapter of peers/ left")
    parser.add_argument("--no-quality", action="store_true", help="seconds and memory alone")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = list(given.row or ROWS)
    rows += [f"w4 --calibration {given.calibration}"] if given.calibration else []
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="lowbit-bench-") as room:
        for number, words in enumerate(rows):
            found.append(run(given.model, words, Path(room) / str(number)))
            print(found[-1], file=sys.stderr, flush=True)
            if given.no_quality:
                shutil.rmtree(Path(room) / str(number))
        found += [peer(folder) for folder in given.peer]
        if not given.no_quality:
            source = open_source(given.model)
            tokenizer, base = source.tokenizer(), source.load_float()
            for kind, text in kinds(given.evaluation).items():
                reference = Reference(base, make_windows(load_text(text), tokenizer, limit=given.windows), 6 << 30)
                for number, row in enumerate(found):
                    if "peer" in row:
                        made = open_source(row["peer"]).load_float()
                    else:
                        made = lowbit.load(Path(room) / str(number), dtype=torch.float32, kernel="dense")
                    kl = measure_quality(made, reference.windows, base=reference).kl_mean
                    assert kl is not None
                    row.setdefault("kl", {})[kind] = (round(kl.value, 5), round(kl.stderr or 0.0, 5))
    facts = {
        "model": Path(given.model).name,
        "windows": given.windows,
        "environment": vars(environment()),
        "rows": found,
    }
    given.out.write_text(json.dumps(facts, indent=1, default=str) + "\n")
    given.out.with_suffix(".md").write_text(markdown(found) + "\n")
    print(markdown(found))


if __name__ == "__main__":
    main()
