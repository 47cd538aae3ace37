"""Logits and greedy tokens of a folder by transformers, without lowbit. See README.md."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import metadata

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

NEW = 16
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("ids")
    parser.add_argument("out")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    with open(given.ids) as file:
        rows = torch.tensor(json.load(file))
    dtype = getattr(torch, given.dtype)
    model = AutoModelForCausalLM.from_pretrained(given.folder, dtype=dtype, device_map="cpu").eval()
    with torch.inference_mode():
        logits = torch.cat([model(input_ids=row[None]).logits.float() for row in rows])
        tokens, seen = [], rows
        for _ in range(NEW):
            nearest = torch.cat([model(input_ids=row[None]).logits[:, -1].argmax(-1) for row in seen])
            tokens.append(nearest)
            seen = torch.cat([seen, nearest[:, None]], 1)
    if "lowbit" in sys.modules:
        raise SystemExit("lowbit was imported; this is to show that the folder does without")
    save_file({"logits": logits, "tokens": torch.stack(tokens, 1)}, given.out)
    layers = {type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__}
    print(json.dumps({"versions": versions(PACKAGES), "linear": sorted(layers), "dtype": given.dtype}))


if __name__ == "__main__":
    main()
