"""How long the engine takes for one more token behind a long text, with keys and values in several formats, by turns in one run.

    python benchmarks/cache_decode.py FOLDER --out benchmarks/results/cache-decode

FOLDER is what lowbit wrote. Every format reads the same text first, then each in turn decodes a few tokens, again and again. Times are
processor seconds of one thread, as others may use the machine meanwhile. Writes OUT.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np

import lowbit
from lowbit.measure.environment import environment

FORMATS = ("int16", "int8", "int8:g32", "int4", "int4:g32")
CHUNK, TOKENS = 512, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--cache", nargs="*", default=FORMATS)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    engines = {cache: lowbit.Engine.open(args.folder, cache=cache, threads=1) for cache in args.cache}
    text = np.random.default_rng(0).integers(0, 10_000, args.context).tolist()
    kept, found = {}, {cache: list[float]() for cache in args.cache}
    for cache, engine in engines.items():
        kept[cache] = engine.kv_cache(1, args.context + args.rounds * TOKENS)
        for first in range(0, args.context, CHUNK):
            engine.forward(kept[cache], [(0, text[first : first + CHUNK], first)], [])
    for turn in range(args.rounds):
        for cache, engine in engines.items():
            begin = time.process_time()
            for i in range(TOKENS):
                engine.forward(kept[cache], [(0, [5], args.context + turn * TOKENS + i)], [0])
            found[cache].append((time.process_time() - begin) / TOKENS)
    first = found[args.cache[0]]
    lines = [
        f"# A token behind {args.context:,} others, by the format of the KV cache", "",
        f"{environment().machine}; {engines[args.cache[0]]}. Processor time of one thread, the median of {args.rounds} turns.", "",
        f"| cache | bytes a token | ms a token | tokens a second | speed beside {args.cache[0]} |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for cache, times in found.items():
        beside = median(a / b for a, b in zip(first, times, strict=True))
        size = engines[cache].describe().cache_bytes_per_token
        lines.append(f"| `{cache}` | {size:,} | {median(times) * 1e3:.2f} | {1 / median(times):.1f} | {beside:.2f} |")
    table = "\n".join([*lines, ""])
    Path(f"{args.out}.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
