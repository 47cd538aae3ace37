"""GPTQModel quantizes a model on the CPU and saves it; its own converter reads the weights back. Or, for AWQ, which it
quantizes on GPUs only: its unpacker reads a folder that is there already."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault(
    "GPTQMODEL_CPU_WORKERS", "2"
)  # read when the library is imported; it stops without it on two cores

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model_dequant import convert_gptq_file
from safetensors.torch import load_file, save_file

TEXT = ["the quick brown fox jumps over the lazy dog and then the end of the thing is near " * 6] * 8


def gptq(source: Path, out: Path, options: dict[str, object]) -> dict[str, torch.Tensor]:
    model = GPTQModel.load(str(source), QuantizeConfig(**options), device="cpu")
    model.quantize(TEXT, batch_size=1)
    model.save(str(out))
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    found = convert_gptq_file(out / "model.safetensors", torch.float32, section, "cpu")
    return {name: value for name, value in found.items() if "_proj" in name}


def awq(out: Path) -> dict[str, torch.Tensor]:
    stored = load_file(out / "model.safetensors")
    size = json.loads((out / "config.json").read_text())["quantization_config"]["group_size"]
    found = {}
    for module in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        parts = [stored[f"{module}.{leaf}"] for leaf in ("qweight", "qzeros", "scales")]
        found[f"{module}.weight"] = dequantize_gemm(*parts, 4, size).T
    return found


def main(source: Path, out: Path, case: str) -> None:
    options = json.loads(case)
    true = gptq(source, out, options) if options else awq(out)
    save_file({name: value.float().contiguous() for name, value in true.items()}, out / "true.values")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
