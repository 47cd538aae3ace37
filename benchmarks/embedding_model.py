"""What quantizing costs an embedding model: cosine with the float model and agreement of rankings, by recipe and by effort, on two texts.

    python benchmarks/embedding_model.py FOLDER EVAL --out benchmarks/results/embedding-model.json [--row "w4" ...]

FOLDER is a model with sentence-transformers files, such as all-MiniLM-L6-v2. Rows are the words after `lowbit quantize FOLDER`; each runs in a
process of its own with `--no-card`, and the folder that it wrote is measured as `lowbit evaluate --against FOLDER` does: windows of 128 tokens
of Python's own manual, and of EVAL (such as WikiText-2).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lowbit
from lowbit.measure.environment import environment
from lowbit.measure.verdict import verdict_of

ROWS = ("w8", "w4", "w4 --data-free", "w4 --effort low", "nl4", "w3", "w3 --data-free", "w2", "w2 --data-free")
FIGURES = ("cosine", "ranks", "nearest", "top")


def run(model: str, words: str, out: Path) -> dict[str, Any]:
    """Quantize by the command that a person types."""
    command = [
        sys.executable,
        "-m",
        "lowbit.cli",
        "quantize",
        model,
        *shlex.split(words),
        "-o",
        str(out),
        "--no-card",
        "--json",
    ]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words}: {done.stderr.strip()}")
    told = json.loads(done.stdout)
    return {
        "words": words, "recipe": told["plan"]["recipe"], "seconds": round(told["seconds"], 1),
        "process_seconds": round(time.perf_counter() - start, 1), "bytes": told["plan"]["output_bytes"],
        "linear_bits": round(told["plan"]["linear_bits_per_weight"], 3),
    }  # fmt: skip


def measured(folder: Path, base: str, text: str | None, windows: int) -> dict[str, Any]:
    card = lowbit.evaluate(folder, base, text, windows=windows)
    found, word = card.outputs, verdict_of(card)
    assert found is not None and word is not None, card.unmeasured
    return {
        "figures": {f.name: [f.estimate.value, f.estimate.stderr] for f in found.figures}, "error": found.error.value,
        "how": found.how, "inputs": found.inputs, "verdict": word.word,
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]], text: str) -> str:
    lines = [
        f"| `lowbit quantize MODEL` … | recipe | bits | MB | s | text | {' | '.join(FIGURES)} | verdict |",
        "| --- | --- | --: | --: | --: | --- | --: | --: | --: | --: | --- |",
    ]
    for r in rows:
        for name in ("manual", text):
            found = r["on"][name]
            cells = " | ".join(f"{v:.5f} ± {e or 0:.5f}" for v, e in (found["figures"][f] for f in FIGURES))
            lines.append(
                f"| `{r['words']}` | `{r['recipe']}` | {r['linear_bits']} | {r['bytes'] / 1e6:.1f} | {r['seconds']} | {name} | {cells} | "
                f"{found['verdict']} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--row", action="append")
    parser.add_argument("--windows", type=int, default=64)
    given = parser.parse_args()
    rows, name = [], Path(given.text).stem
    with tempfile.TemporaryDirectory() as place:
        for number, words in enumerate(given.row or ROWS):
            out = Path(place) / str(number)
            row = run(given.model, words, out)
            row["on"] = {
                "manual": measured(out, given.model, None, given.windows),
                name: measured(out, given.model, given.text, given.windows),
            }
            print(markdown([row], name).splitlines()[2:])
            rows.append(row)
    given.out.write_text(json.dumps({"environment": asdict(environment()), "rows": rows}, indent=1) + "\n")
    print(markdown(rows, name))


if __name__ == "__main__":
    main()
