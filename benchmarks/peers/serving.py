"""A peer that stays loaded and answers how fast it is when asked, so that several can take turns in one run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

PROMPT, NEW, PREFILL, BATCH, LENGTH = 64, 128, 512, 20, 100
START = 5  # tokens that sequences of the batch begin with


def prompt_ids(count: int) -> list[int]:
    """The ids that every program is given."""
    return [i * 37 % 1000 + 10 for i in range(count)]


def tokens_of(folder: str) -> list[str]:
    """The token of every id, from tokenizer.json."""
    model = json.loads((Path(folder) / "tokenizer.json").read_text())["model"]
    return [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]


def serve(seconds: Callable[[int, int, int], float]) -> None:
    """Answer `decode`, `prefill` and `batch` with tokens per second until stdin ends.

    seconds(sequences, prompt, new) generates `new` tokens greedily after `prompt` for each sequence. Decoding is what
    remains of a generation when that of its first token is taken away.
    """
    print("ready", flush=True)
    for line in sys.stdin:
        what = line.strip()
        if what == "decode":
            rate = (NEW - 1) / (seconds(1, PROMPT, NEW) - seconds(1, PROMPT, 1))
        elif what == "prefill":
            rate = PREFILL / seconds(1, PREFILL, 1)
        elif what == "batch":
            rate = BATCH * (LENGTH - START) / seconds(BATCH, START, LENGTH - START)
        else:
            raise SystemExit(f"asked for {what!r}: decode, prefill or batch")
        print(rate, flush=True)
