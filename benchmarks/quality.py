"""Quality of every data-free recipe on one model, with llama.cpp's block formats beside them in the same run.

    python benchmarks/quality.py MODEL TEXT --out benchmarks/results/quality.json [--windows 24] [--recipes RECIPE ...]

Each recipe is quantized, written, read back by `from_pretrained` and measured; the peers' tensors are rounded by
the `gguf` package's own quantizers (linear layers as named, embedding Q8_0) and put into the float model.
Windows of 1024 tokens, KL(float || quantized) in nats per token, float32 arithmetic.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import gguf
import torch

from lowbit.calibration.text import load_text
from lowbit.interchange.opening import open_source
from lowbit.interchange.source import Source
from lowbit.measure import api
from lowbit.measure.card import Card, CardParts, TextMark
from lowbit.measure.compare import CompareRow
from lowbit.measure.environment import environment
from lowbit.measure.quality import Reference, measure_quality
from lowbit.measure.windows import Windows, make_windows
from lowbit.report.tables import compare_records, markdown_compare

PEERS = ("Q8_0", "Q4_0")
LINEAR_BITS = {"Q8_0": 8.5, "Q4_0": 4.5}


def peer_row(source: Source, name: str, base: Reference, windows: Windows) -> CompareRow:
    """The model with its matrices rounded to a llama.cpp block format."""
    model = source.load_float()
    done = set()
    for key, parameter in model.named_parameters():
        if parameter.dim() != 2 or id(parameter) in done:
            continue
        done.add(id(parameter))
        kind = gguf.GGMLQuantizationType[name if "embed" not in key else "Q8_0"]
        blocks = gguf.quants.quantize(parameter.detach().numpy(), kind)
        parameter.data.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, kind)))
    quality = measure_quality(model, windows, base=base)
    parts = CardParts(source.label, f"llama.cpp {name}", linear_bits=LINEAR_BITS[name])
    return CompareRow(f"llama.cpp {name}", Card(parts, TextMark.of(windows), quality, environment=environment()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--recipes", nargs="*")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    source = open_source(arguments.model)
    windows = make_windows(load_text(arguments.text), source.tokenizer(), limit=arguments.windows)
    reference = Reference(source.load_float(), windows, 6 << 30)
    rows = [peer_row(source, name, reference, windows) for name in PEERS]
    rows += api.compare(
        arguments.model, arguments.recipes or None, text=arguments.text, windows=arguments.windows,
        on_row=lambda row: print(time.strftime("%H:%M:%S"), row.recipe, row.error or kl_of(row), file=sys.stderr, flush=True),
    )  # fmt: skip
    rows = [hide_place(row) for row in rows]
    peer = next(kl_of(row) for row in rows if row.recipe == "llama.cpp Q4_0")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(compare_records(rows), indent=1, ensure_ascii=False) + "\n")
    lines = [markdown_compare(rows), "", "KL over that of llama.cpp Q4_0:", ""]
    lines += [f"- {row.recipe}: {kl_of(row) / peer:.3f}" for row in rows if row.card and not row.is_base]
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def kl_of(row: CompareRow) -> float:
    """Mean KL of a row, nats per token."""
    quality = row.card.quality if row.card else None
    return quality.kl_mean.value if quality and quality.kl_mean else 0.0


def hide_place(row: CompareRow) -> CompareRow:
    """The row without the path of the model on this machine."""
    if row.card is None:
        return row
    # The time of quantizing says more about what else ran; `everyday.py` measures it.
    parts = dataclasses.replace(row.card.parts, model="SmolLM2-135M-Instruct, channels shuffled", quantize_seconds=None)
    text = row.card.text and dataclasses.replace(row.card.text, name=Path(row.card.text.name).name)
    return dataclasses.replace(row, card=dataclasses.replace(row.card, parts=parts, text=text))


if __name__ == "__main__":
    main()
