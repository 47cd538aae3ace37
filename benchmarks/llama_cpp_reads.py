"""llama.cpp reads what lowbit writes: every block type and every family, its tokens and logits beside lowbit's own.

    python benchmarks/llama_cpp_reads.py --out benchmarks/results/llama-cpp.json [--folder LOWBIT_FOLDER ...]

Needs `pip install xllamacpp`. Block types on a random Llama of 256 channels; families on random models of 32 channels
with one faint matrix in few bits and the rest float32, so that only the order of rows, positions, norms and constants can
differ; then each folder given, which must be one that GGUF can hold. Logits: those of the token after the text,
|a - b| / |b| with the mean of each taken off; greedy tokens: how many of 8 are the same up to the first that is not.
llama.cpp rounds the inputs of quantized products to 8 bits, lowbit's reference here does not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import lowbit

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "interchange")]

from gguf_models import FAMILY_MODELS, faint_of, save_model  # noqa: E402
from llama_cpp_reader import LlamaCpp  # noqa: E402

from lowbit.interchange.exporters.gguf.types import TYPES  # noqa: E402

TEXT = "the hen and an inn in the tree"
NEW = 8


def compared(folder: Path, file: Path) -> dict[str, Any]:
    """What llama.cpp makes of the file, beside lowbit's folder."""
    llama = LlamaCpp(file)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False)["input_ids"]
    model = lowbit.load(folder, dtype=torch.float32, kernel="dense")
    seen = torch.tensor([ids])
    with torch.inference_mode():
        logits = model(seen).logits[0, -1]
        for _ in range(NEW):
            seen = torch.cat([seen, model(seen).logits[:, -1].argmax(-1)[None]], 1)
    ours = logits - logits.mean()
    found = llama.log_probabilities(ids, len(logits))
    same = [a == b for a, b in zip(llama.greedy(ids, NEW), seen[0, len(ids) :].tolist())]
    return {
        "tokens": llama.tokens(TEXT) == ids,
        "logits": float((found - found.mean() - ours).norm() / ours.norm()),
        "greedy": (same.index(False) if False in same else len(same)),
    }


def markdown(rows: list[dict[str, Any]], version: str) -> str:
    lines = [
        f"llama.cpp as xllamacpp {version} has it. Every file was written by `lowbit export --as gguf`.",
        "",
        "| what | loads | same tokens of a text | logits error | same greedy tokens |",
        "| --- | --- | --- | --: | --: |",
    ]
    for r in rows:
        yes = "yes" if r["tokens"] else "no"
        lines.append(f"| {r['what']} | yes | {yes} | {r['logits']:.1e} | {r['greedy']} of {NEW} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="lowbit-bench-") as name:
        room = Path(name)
        sizes = FAMILY_MODELS["llama"]().to_dict() | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
        save_model(transformers.LlamaConfig.from_dict(sizes), room / "wide")
        for kind in TYPES:
            lowbit.quantize(room / "wide", f"{kind.text},embed=q8_0", room / kind.name)
            file = lowbit.export(room / kind.name, "gguf").path
            rows.append({"what": f"{kind.name}, Llama of 256 channels", **compared(room / kind.name, file)})
        for family, config in FAMILY_MODELS.items():
            faint = faint_of(family)
            save_model(config(), room / family, spread=0.3, faint=faint)
            lowbit.quantize(room / family, f"q8_0,embed=keep,*=keep,{faint}=q8_0", room / f"{family}-q")
            file = lowbit.export(room / f"{family}-q", "gguf").path
            rows.append({"what": f"{family}, float32 but for one faint matrix", **compared(room / f"{family}-q", file)})
        for folder in arguments.folder:
            file = lowbit.export(folder, "gguf", room / f"{folder.name}.gguf").path
            recipe = json.loads((folder / "config.json").read_text())["quantization_config"]["recipe"]
            rows.append({"what": f"{folder.name}, `{recipe}`", **compared(folder, file)})
    version = importlib.metadata.version("xllamacpp")
    arguments.out.write_text(json.dumps({"xllamacpp": version, "rows": rows}, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(markdown(rows, version) + "\n")
    print(markdown(rows, version))


if __name__ == "__main__":
    main()
