"""The engine's speed beside transformers and llama.cpp, taking turns in one run: `lowbit bench`, kept as a result.

    python benchmarks/engine.py FOLDER --beside MODEL --llama-bench BIN --gguf FILE --out benchmarks/results/engine \\
        --program "CTranslate2 int8=PEER_PYTHON benchmarks/peers/ctranslate2_speed.py MODEL WORK"

FOLDER is what lowbit wrote; both kinds of activations are measured. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import lowbit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--beside", nargs="*")
    parser.add_argument("--dtype", help="of what transformers runs; float32")
    parser.add_argument("--llama-bench")
    parser.add_argument("--gguf", nargs="*", default=[])
    parser.add_argument("--program", nargs="*", default=[], help="NAME=COMMAND")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    found = lowbit.bench(
        args.folders, beside=args.beside, dtype=args.dtype, gguf=args.gguf, llama_bench=args.llama_bench,
        programs=dict(text.split("=", 1) for text in args.program), activations=["int8", "exact"], threads=args.threads, rounds=args.rounds,
        progress=lambda done, total: print(f"\r{done}/{total}", end="", file=sys.stderr),
    )  # fmt: skip
    text = f"# The engine beside others\n\n    python {shlex.join(sys.argv)}\n\n{found}"
    Path(f"{args.out}.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    Path(f"{args.out}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
