"""Time and peak memory of the everyday command: the demo model to w4, reading, writing and verifying included.

    python benchmarks/everyday.py [--model smollm2] [--recipe w4] [--runs 3] [--out FILE]

Each run is a fresh process of `lowbit quantize MODEL RECIPE --no-card`; the least and the median are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from lowbit.measure.environment import environment
from lowbit.measure.memory import in_fresh_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--recipe", default="w4")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seconds, peaks = [], []
    for _ in range(arguments.runs):
        with tempfile.TemporaryDirectory() as folder:
            command = ["-m", "lowbit.cli", "quantize", arguments.model, arguments.recipe, "--no-card"]
            start = time.perf_counter()
            run = in_fresh_process([*command, "-o", str(Path(folder) / "out")])
            seconds.append(time.perf_counter() - start)
            peaks.append(run.bytes)
    machine = environment()
    result = {
        "model": arguments.model, "recipe": arguments.recipe, "seconds": [round(s, 2) for s in seconds],
        "median_seconds": round(statistics.median(seconds), 2), "peak_resident_bytes": max(peaks),
        "machine": getattr(machine, "machine", str(machine)),
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
