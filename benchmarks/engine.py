"""The engine's speed beside transformers in float32 and llama.cpp, taking turns in one run.

    python benchmarks/engine.py FOLDER... --float MODEL --llama-bench BIN --gguf FILE... --out engine \\
        --peer "NAME=PEER_PYTHON benchmarks/peers/ctranslate2_speed.py MODEL WORK"

FOLDER is what lowbit wrote. Every round runs each program once for each figure; a figure is the median of the rounds.
Decode: 128 tokens after 64 (llama-bench: after none). Prefill: 512 tokens. Batch: 20 sequences from 5 to 100 tokens.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lowbit
from lowbit import Engine, _core
from lowbit.interchange.source import open_source
from lowbit.measure.speed import greedy_times
from lowbit.report.doctor import examine

Probe = Callable[[], float]


def engine_probes(engine: Engine) -> dict[str, Probe]:
    def times(sequences: int, prompt: int, new: int) -> list[float]:
        memory = engine.memory(sequences, prompt + new)
        ids = (np.arange(prompt) * 37 % 1000 + 10).tolist()
        start, found = time.perf_counter(), []
        logits = engine._forward(memory, [(i, ids, 0) for i in range(sequences)], range(sequences))
        for step in range(new):
            tokens = logits.argmax(-1)
            found.append(time.perf_counter() - start)
            if step + 1 < new:
                pieces = [(i, [int(tokens[i])], prompt + step) for i in range(sequences)]
                logits = engine._forward(memory, pieces, range(sequences))
        return found

    return probes_of(times)


def transformers_probes(model: Any) -> dict[str, Probe]:
    def times(sequences: int, prompt: int, new: int) -> list[float]:
        ids = (torch.arange(prompt) * 37 % 1000 + 10)[None].expand(sequences, -1)
        return greedy_times(model, ids, new)

    return probes_of(times)


def probes_of(times: Callable[[int, int, int], list[float]]) -> dict[str, Probe]:
    def decode() -> float:
        found = times(1, 64, 128)
        return (len(found) - 1) / (found[-1] - found[0])

    return {
        "decode": decode,
        "prefill": lambda: 512 / times(1, 512, 1)[-1],
        "batch": lambda: 20 * 95 / times(20, 5, 95)[-1],
    }


def peer_probes(command: str) -> dict[str, Probe]:
    """A program that stays loaded and answers questions (benchmarks/peers/serving.py)."""
    peer = subprocess.Popen(
        shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert peer.stdin is not None and peer.stdout is not None
    for line in peer.stdout:
        if line.strip() == "ready":
            break
    else:
        raise SystemExit(f"it stopped before it was ready: {command}")

    def ask(what: str) -> float:
        print(what, file=peer.stdin, flush=True)
        return float(peer.stdout.readline())

    return {what: lambda what=what: ask(what) for what in ("decode", "prefill", "batch")}


def llama_probes(binary: str, gguf: str, threads: int) -> dict[str, Probe]:
    def bench(*options: str) -> float:
        command = [binary, "-m", gguf, "-t", str(threads), "-r", "1", "-o", "json", *options]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return float(found[0]["avg_ts"])

    return {"decode": lambda: bench("-p", "0", "-n", "128"), "prefill": lambda: bench("-p", "512", "-n", "0")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--float", dest="float_model")
    parser.add_argument("--llama-bench")
    parser.add_argument("--gguf", nargs="*", default=[])
    parser.add_argument("--peer", nargs="*", default=[], help="NAME=COMMAND")
    parser.add_argument("--transformers", action="store_true", help="the folders through transformers, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", required=True, help="writes OUT.json and OUT.md")
    args = parser.parse_args()
    threads = args.threads or _core.features()["cores"]
    torch.set_num_threads(threads)

    programs: dict[str, dict[str, Probe]] = {}
    sizes: dict[str, int] = {}
    for folder in args.folders:
        for activations in ("int8", "exact"):
            engine = Engine.open(folder, activations=activations, threads=threads)
            name = f"lowbit {Path(folder).name}, {activations} activations"
            programs[name], sizes[name] = engine_probes(engine), engine.describe().packed_bytes
    for gguf in args.gguf:
        name = f"llama.cpp {Path(gguf).stem}"
        programs[name], sizes[name] = llama_probes(args.llama_bench, gguf, threads), Path(gguf).stat().st_size
    for peer in args.peer:
        name, _, command = peer.partition("=")
        programs[name] = peer_probes(command)
    if args.transformers:
        for folder in args.folders:
            model = lowbit.load(folder, dtype=torch.float32)
            programs[f"transformers, lowbit {Path(folder).name}"] = transformers_probes(model)
    if args.float_model:
        model = open_source(args.float_model).load_float(torch.float32)
        programs["transformers float32"] = transformers_probes(model)

    rows: dict[str, dict[str, list[float]]] = {name: {p: [] for p in probes} for name, probes in programs.items()}
    limits: list[dict[str, float]] = []
    for turn in range(args.rounds + 1):
        limits.append(_core.limits(_core.Pool(threads)))
        for name, probes in programs.items():
            if turn > 2 and name.startswith("transformers"):
                continue  # slow; two rounds say enough
            for what, probe in probes.items():
                value = probe()
                if turn:  # the first warms up
                    rows[name][what].append(value)
    best = {key: max(one[key] for one in limits) for key in limits[0]}
    result: dict[str, Any] = {
        "threads": threads, "limits": best, "rows": rows, "bytes": sizes, "isa": _core.isas()[0],
        "machine": str(examine(kernels=False).__dict__.get("machine", "")),
    }  # fmt: skip
    Path(f"{args.out}.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(f"{args.out}.md").write_text(table(result))
    print(table(result))


def table(result: dict[str, Any]) -> str:
    limits = result["limits"]
    lines = [
        "# The engine beside others",
        "",
        f"Tokens per second, medians of rounds in which all took turns, {result['threads']} threads, {result['isa']}. This machine read"
        f" {limits['read_bytes_per_second'] / 1e9:.0f} GB/s and took {limits['int8_products_per_second'] / 1e9:.0f} G products of"
        " bytes a second. Decode is also given as the share of that reading which the packed weights of each token make up.",
        "",
        "| program | MB | decode | of reading | prefill 512 | batch 20 |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for name, figures in result["rows"].items():
        found = {what: statistics.median(values) for what, values in figures.items() if values}
        size = result["bytes"].get(name)
        share = found["decode"] * size / limits["read_bytes_per_second"] if size and "decode" in found else None
        cells = [
            f"{size / 1e6:.0f}" if size else "",
            f"{found['decode']:.0f}" if "decode" in found else "",
            f"{share:.0%}" if share is not None else "",
            f"{found['prefill']:.0f}" if "prefill" in found else "",
            f"{found['batch']:.0f}" if "batch" in found else "",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
