"""Logits of a folder by GPTQModel's own loader, without lowbit: it has experts, which transformers does not load. See README.md."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel import __version__ as version
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ids")
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", metavar="DTYPE=FOLDER")
    given = parser.parse_args()
    dtype, _, folder = given.folder.partition("=")
    with open(given.ids) as file:
        rows = torch.tensor(json.load(file))
    model = GPTQModel.load(folder, device="cpu", backend=BACKEND.AUTO, dtype=getattr(torch, dtype))
    with torch.inference_mode():
        logits = torch.cat([model.model(input_ids=row[None]).logits.float() for row in rows])
    save_file({"logits": logits}, given.out / "0.safetensors")
    if "lowbit" in sys.modules:
        raise SystemExit("lowbit was imported; this is to show that the folder does without")
    print(json.dumps({"versions": {"gptqmodel": str(version), "torch": torch.__version__}, "dtype": dtype}), flush=True)


if __name__ == "__main__":
    main()
