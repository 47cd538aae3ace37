"""Quality per bit of the calibrated methods, with peers on the same windows in the same run.

    python benchmarks/calibrated.py MODEL CALIBRATION EVAL --out benchmarks/results/calibrated.json
        [--recipes RECIPE ...] [--samples 32] [--windows 24]
        [--peer "llama:PYTHON:Q4_K_M-im" ...]       # adapter, its Python, its configuration; see peers/README.md

Every recipe is quantized by the command line in a process of its own (seconds, peak resident memory), read back by
`from_pretrained` and measured beside the float model: windows of 1024 tokens, KL(float || quantized) in nats per token,
float32 arithmetic. Peers are quantized by their own adapters in their own environments, alternating with the recipes.
Rows that are in OUT already are kept, so that a run that was stopped goes on; --again measures them anew.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import lowbit
from lowbit.calibration.text import load_text
from lowbit.interchange.opening import open_source
from lowbit.measure.environment import environment
from lowbit.measure.quality import Reference, measure_quality
from lowbit.measure.windows import make_windows

# What is to be seen: text on the command line, bits, and the KL that is to be reached.
RECIPES = (
    "w4", "nl4", "gptq@int4:g32", "search@int4:g32", "qronos@int4:g128", "qronos@int5:g32", "qronos@int3:g32",
    "w8a8", "w4a8",
)  # fmt: skip


def quantized_row(
    model: str, recipe: str, calibration: str, samples: int, out: Path, extra: list[str]
) -> dict[str, Any]:
    """Quantize in a process of its own, by the command that a user would type."""
    command = [
        sys.executable, "-m", "lowbit.cli", "quantize", model, recipe, "-o", str(out), "--no-card", "--json",
        "--calibration", calibration, "--samples", str(samples), *extra,
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{recipe}: {done.stderr.strip()}")
    told = json.loads(done.stdout)
    plan = told["plan"]
    inputs = {key: plan[key] for key in ("inputs", "ranges") if plan.get(key)}
    return inputs | {
        "recipe": shown(" ".join([recipe, *extra])), "text": plan["recipe"], "seconds": round(told["seconds"], 1),
        "process_seconds": round(time.perf_counter() - start, 1), "peak_mb": round(told["peak_bytes"] / 1e6),
        "linear_bits": round(plan["linear_bits_per_weight"], 4), "bits": round(plan["bits_per_weight"], 4),
        "file_mib": round(plan["output_bytes"] / 2**20, 2), "planned_peak_mb": round(plan["peak_bytes"] / 1e6),
    }  # fmt: skip


def peer_row(
    spec: str, model: str, calibration: str, evaluation: str, windows: int, out: Path
) -> tuple[dict[str, Any], Path | None]:
    """Run a peer's adapter; its row, and the folder of its dequantized weights if quality is to be measured here."""
    name, python, config = spec.split(":")
    adapter = Path(__file__).parent / "peers" / f"{name}_peer.py"
    command = [python, str(adapter), model, calibration, str(out), "--config", config]
    if name == "torchao":
        command += ["--eval", evaluation, "--eval-windows", str(windows)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{spec}: {done.stderr.strip()[-500:]}")
    told = json.loads((out / "result.json").read_text())  # what a peer's libraries print beside it does not matter
    row = {
        "recipe": f"{told['peer']} {told['version']} {told['config']}", "peer": True, "seconds": round(told["seconds"], 1),
        "peak_mb": round(told["peak_resident_bytes"] / 1e6), "linear_bits": round(told["linear_bits"], 4),
        "bits": round(told["bits_per_weight"], 4), "file_mib": round(told["file_bytes"] / 2**20, 2),
    }  # fmt: skip
    if told["quality"]:
        quality = told["quality"]
        row |= {
            "kl": quality["kl_mean"]["value"], "kl_stderr": quality["kl_mean"]["stderr"],
            "perplexity": quality["perplexity"]["value"], "top1": quality["top1"]["value"],
        }  # fmt: skip
    return row, out / told["weights"] if told["weights"] else None


def measured(model: torch.nn.Module, reference: Reference) -> dict[str, Any]:
    quality = measure_quality(model, reference.windows, base=reference)
    assert quality.kl_mean and quality.top1
    return {
        "kl": round(quality.kl_mean.value, 5), "kl_stderr": round(quality.kl_mean.stderr or 0.0, 5),
        "perplexity": round(quality.perplexity.value, 4), "top1": round(quality.top1.value, 5),
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| recipe | linear bits | bits/weight | MiB | perplexity | KL | ± | top-1 % | quantizing s | peak MB |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for r in sorted(rows, key=lambda r: (-r["linear_bits"], r["kl"])):
        name = r["recipe"] if r.get("peer") else f"`{r['recipe']}`"
        lines.append(
            f"| {name} | {r['linear_bits']:.3f} | {r['bits']:.2f} | {r['file_mib']:.1f} | {r['perplexity']:.3f} | "
            f"{r['kl']:.4f} | {r['kl_stderr']:.4f} | {100 * r['top1']:.2f} | {r['seconds']:.0f} | {r['peak_mb']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), help="a recipe, and options after a space")
    parser.add_argument("--peer", action="append", default=[])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    source = open_source(arguments.model)
    windows = make_windows(load_text(arguments.evaluation), source.tokenizer(), limit=arguments.windows)
    reference: Reference | None = None
    rows: list[dict[str, Any]] = []
    if arguments.out.exists() and not arguments.again:
        rows = json.loads(arguments.out.read_text())["rows"]
    done = {r["recipe"] for r in rows} | {r.get("spec") for r in rows}
    for kind, what in alternating(arguments.recipes, arguments.peer):
        if shown(what) in done or what in done:
            continue
        with tempfile.TemporaryDirectory(prefix="lowbit-bench-") as room:
            out = Path(room) / "out"
            if kind == "peer":
                row, folder = peer_row(
                    what, arguments.model, arguments.calibration, arguments.evaluation, arguments.windows, out
                )
                row["spec"] = what.split(":")[0] + ":" + what.split(":")[2]
            else:
                recipe, *extra = what.split(" ")
                row, folder = (
                    quantized_row(arguments.model, recipe, arguments.calibration, arguments.samples, out, extra),
                    out,
                )
            if folder is not None:
                if reference is None:
                    reference = Reference(source.load_float(), windows, 6 << 30)
                whole = kind == "peer" or bool(row.get("inputs"))
                built = open_source(folder).load_float() if kind == "peer" else lowbit.load(
                    folder, dtype=torch.float32, kernel="auto" if whole else "dense"
                )  # fmt: skip
                row |= measured(built, reference)
        print(time.strftime("%H:%M:%S"), row, file=sys.stderr, flush=True)
        rows.append(row)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"windows": arguments.windows, "samples": arguments.samples, "environment": environment()}
        facts["environment"] = (
            vars(facts["environment"]) if hasattr(facts["environment"], "__dict__") else str(facts["environment"])
        )
        arguments.out.write_text(json.dumps({**facts, "rows": rows}, indent=1, default=str) + "\n")
        arguments.out.with_suffix(".md").write_text(markdown(rows) + "\n")
    print(markdown(rows))


def shown(what: str) -> str:
    """A recipe with its options, without the place of a sensitivity file; a peer by adapter and configuration."""
    if what.count(":") == 2 and "@" not in what:
        return what.split(":")[0] + ":" + what.split(":")[2]
    return re.sub(r" --sensitivity \S+", "", what)


def alternating(recipes: list[str], peers: list[str]) -> list[tuple[str, str]]:
    """A recipe, a peer, a recipe, ...; so that a machine that slows down slows both."""
    out: list[tuple[str, str]] = []
    for i in range(max(len(recipes), len(peers))):
        out += [("recipe", r) for r in recipes[i : i + 1]] + [("peer", p) for p in peers[i : i + 1]]
    return out


if __name__ == "__main__":
    main()
