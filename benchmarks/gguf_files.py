"""GGUF files of lowbit beside llama-quantize's with an importance matrix: the same text, the same size or less.

    python benchmarks/gguf_files.py MODEL CALIBRATION EVAL --peer PYTHON --work FOLDER --out benchmarks/results/gguf.json
        [--pairs "iq4_nl:IQ4_NL" "w4 --target-bits 5.53:Q4_K_M" ...] [--samples 32] [--windows 24] [--pre gpt-2]

A pair is a recipe with options and a type of llama-quantize. lowbit's file is made by the command that a user would
type, in a process of its own; llama.cpp's by peers/llama_peer.py in the Python given (see peers/README.md), which keeps
the float GGUF and the importance matrix in FOLDER. Both files are then read by the same reader (lowbit's, whose values
are those of the `gguf` package) and measured beside the float model: windows of 1024 tokens, KL(float || quantized) in
nats per token, float32 arithmetic. Rows that are in OUT already are kept; --again measures them anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from lowbit.calibration.text import load_text
from lowbit.interchange.opening import open_source
from lowbit.interchange.readers.gguf.file import GgufSource
from lowbit.measure.environment import environment
from lowbit.measure.quality import Reference, measure_quality
from lowbit.measure.windows import make_windows

PAIRS = ("q4_0:Q4_0", "iq4_nl:IQ4_NL", "q5_0:Q5_0", "w4 --target-bits 5.53:Q4_K_M", "q4_k_m:Q4_K_M")


def ours(model: str, recipe: str, calibration: str, samples: int, out: Path) -> dict[str, Any]:
    """Quantize by the command line."""
    name, *extra = recipe.split(" ")
    command = [
        sys.executable, "-m", "lowbit.cli", "quantize", model, name, "--as", "gguf", "-o", str(out), "--no-card",
        "--json", "--calibration", calibration, "--samples", str(samples), *extra,
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{recipe}: {done.stderr.strip()[-500:]}")
    told = json.loads(done.stdout)
    return {
        "who": "lowbit", "name": recipe, "recipe": told["plan"]["recipe"], "read_back": told["exported"],
        "seconds": round(time.perf_counter() - start, 1), "peak_mb": round(told["peak_bytes"] / 1e6),
    }  # fmt: skip


def theirs(
    python: str, model: str, kind: str, calibration: str, samples: int, work: Path, out: Path, pre: str | None
) -> dict[str, Any]:
    """Quantize by llama-quantize with llama-imatrix."""
    adapter = Path(__file__).parent / "peers" / "llama_peer.py"
    with tempfile.TemporaryDirectory(prefix="lowbit-bench-") as room:
        command = [
            python, str(adapter), model, calibration, room, "--config", f"{kind}-im", "--windows", str(samples),
            "--work", str(work), "--gguf", str(out), *(["--pre", pre] if pre else []),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{kind}: {done.stderr.strip()[-500:]}")
        told = json.loads((Path(room) / "result.json").read_text())
    return {
        "who": f"llama.cpp {told['version']}", "name": f"{kind} with imatrix", "seconds": round(told["seconds"], 1),
        "peak_mb": round(told["peak_resident_bytes"] / 1e6),
    }  # fmt: skip


def contents(path: Path) -> dict[str, Any]:
    """Bytes of the file, bits per weight of the blocks' matrices, and how many tensors have each type."""
    import gguf

    bits = weights = 0
    types: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            bits, weights = bits + 8 * int(tensor.n_bytes), weights + int(tensor.n_elements)
            types[tensor.tensor_type.name] += 1
        elif tensor.name in ("token_embd.weight", "output.weight"):
            types[f"{tensor.name.removesuffix('.weight')} {tensor.tensor_type.name}"] += 1
    return {"bytes": path.stat().st_size, "linear_bits": round(bits / weights, 4), "types": dict(types)}


def quality(path: Path, config: Any, reference: Reference) -> dict[str, Any]:
    found = measure_quality(GgufSource(path, config=config).load_float(), reference.windows, base=reference)
    assert found.kl_mean and found.top1
    return {
        "kl": float(f"{found.kl_mean.value:.4g}"), "kl_stderr": float(f"{found.kl_mean.stderr or 0.0:.3g}"),
        "perplexity": round(found.perplexity.value, 4), "top1": round(found.top1.value, 5),
    }  # fmt: skip


def shown(kl: float) -> str:
    """Four places, or two digits where these would be zeros."""
    return f"{kl:.4f}" if kl >= 1e-3 or not kl else f"{kl:.1e}" if kl < 1e-4 else f"{kl:.5f}"


def markdown(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    lines = [
        "| file | who | MiB | linear bits | perplexity | KL | ± | KL ratio | types of the blocks |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --- |",
    ]
    for mine, other in pairs:
        for row in (mine, other):
            ratio = f"{mine['kl'] / other['kl']:.2f}" if row is mine else ""
            types = ", ".join(f"{n} {t}" for t, n in row["types"].items() if " " not in t)
            lines.append(
                f"| `{row['name']}` | {row['who']} | {row['bytes'] / 2**20:.2f} | {row['linear_bits']:.3f} | "
                f"{row['perplexity']:.3f} | {shown(row['kl'])} | {shown(row['kl_stderr'])} | {ratio} | {types} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--pairs", nargs="*", default=list(PAIRS), help="recipe and options, a colon, llama.cpp's type")
    parser.add_argument("--peer", required=True, help="Python of peers/llama_peer.py")
    parser.add_argument("--work", type=Path, required=True, help="keeps the float GGUF and the importance matrix")
    parser.add_argument("--pre", help="llama.cpp's name of the pre-tokenizer, where its converter does not know it")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows: dict[str, Any] = {}
    if arguments.out.exists() and not arguments.again:
        rows = {row["key"]: row for row in json.loads(arguments.out.read_text())["rows"]}
    source = open_source(arguments.model)
    reference: Reference | None = None
    arguments.work.mkdir(parents=True, exist_ok=True)
    for pair in arguments.pairs:
        recipe, _, kind = pair.rpartition(":")
        for key in (recipe, f"{kind}-im"):
            if key in rows:
                continue
            with tempfile.TemporaryDirectory(prefix="lowbit-bench-") as room:
                file = Path(room) / "model.gguf"
                if key == recipe:
                    row = ours(arguments.model, recipe, arguments.calibration, arguments.samples, file)
                else:
                    row = theirs(
                        arguments.peer, arguments.model, kind, arguments.calibration, arguments.samples, arguments.work,
                        file, arguments.pre,
                    )  # fmt: skip
                if reference is None:
                    windows = make_windows(load_text(arguments.evaluation), source.tokenizer(), limit=arguments.windows)
                    reference = Reference(source.load_float(), windows, 6 << 30)
                row |= {"key": key, **contents(file), **quality(file, source.config, reference)}
            print(time.strftime("%H:%M:%S"), row, file=sys.stderr, flush=True)
            rows[key] = row
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            facts = {"windows": arguments.windows, "samples": arguments.samples, "environment": vars(environment())}
            arguments.out.write_text(json.dumps({**facts, "rows": list(rows.values())}, indent=1, default=str) + "\n")
    found = [(r, f"{k}-im") for r, _, k in (pair.rpartition(":") for pair in arguments.pairs)]
    text = markdown([(rows[mine], rows[other]) for mine, other in found])
    arguments.out.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
