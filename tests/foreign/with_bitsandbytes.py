"""bitsandbytes, through transformers and on the CPU, quantizes a model and saves it; and reads the weights back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main(source: Path, out: Path, case: str) -> None:
    config = BitsAndBytesConfig(**json.loads(case), bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(out)
    true = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            true[f"{name}.weight"] = bnb.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            ).float()
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            true[f"{name}.weight"] = module.weight.data.float() * scale.view(-1, 1) / 127
    save_file({k: v.contiguous() for k, v in true.items()}, out / "true.values")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
