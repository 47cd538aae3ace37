"""Logits and greedy tokens of folders by transformers, without lowbit. See README.md."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

NEW = 8
PACKAGES = ("transformers", "compressed-tensors", "gptqmodel", "torch")


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """The installed ones of these packages."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read(folder: str, rows: torch.Tensor, dtype: torch.dtype, out: Path) -> dict[str, object]:
    """What one folder computes goes to `out`; which layers and types it has comes back."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu").eval()
    with torch.inference_mode():
        logits = torch.cat([model(input_ids=row[None]).logits.float() for row in rows])
        seen = rows
        for _ in range(NEW):
            nearest = torch.cat([model(input_ids=row[None]).logits[:, -1].argmax(-1) for row in seen])
            seen = torch.cat([seen, nearest[:, None]], 1)
    save_file({"logits": logits, "tokens": seen[:, rows.shape[1] :].contiguous()}, out)
    layers = {type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__}
    return {"linear": sorted(layers), "dtype": str(dtype).removeprefix("torch.")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ids")
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", nargs="+", metavar="DTYPE=FOLDER")
    given = parser.parse_args()
    with open(given.ids) as file:
        rows = torch.tensor(json.load(file))
    for i, item in enumerate(given.folders):
        dtype, _, folder = item.partition("=")
        try:
            found = read(folder, rows, getattr(torch, dtype), given.out / f"{i}.safetensors")
        except Exception as error:  # what a reader raises is its own business, and one folder is not the next
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        if "lowbit" in sys.modules:
            raise SystemExit("lowbit was imported; this is to show that the folder does without")
        print(json.dumps({"versions": versions(PACKAGES), **found}), flush=True)


if __name__ == "__main__":
    main()
