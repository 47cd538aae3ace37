"""compressed-tensors writes the linear layers of a model in one of its formats, and reads them back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from torch import Tensor


def ranges(weight: Tensor, args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each block."""
    strategy = args["strategy"]
    if strategy == "tensor":
        return weight.min().view(1), weight.max().view(1)
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if strategy == "block":
        rows, cols = args["block_structure"]
        blocks = weight.view(weight.shape[0] // rows, rows, weight.shape[1] // cols, cols)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.view(weight.shape[0], -1, args["group_size"])
    return groups.amin(-1), groups.amax(-1)


def main(source: Path, out: Path, case: str) -> None:
    kind, args = json.loads(case)
    made = QuantizationArgs(**args)
    scheme, compressor = (
        QuantizationScheme(targets=["Linear"], weights=made),
        BaseCompressor.get_value_from_registry(kind),
    )
    stored, true = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if "_proj" not in name:
            stored[name] = weight
            continue
        low, high = ranges(weight, args)
        whole = generate_gparam(weight.min(), weight.max()) if args["strategy"] == "tensor_group" else None
        scale, zero = calculate_qparams(low, high, made, **({} if whole is None else {"global_scale": whole}))
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        parts = compressor.compress(state | ({} if whole is None else {"weight_global_scale": whole}), scheme)
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{leaf}": part.detach().clone().contiguous() for leaf, part in parts.items()}
        true[name] = compressor.decompress({k: v.clone() for k, v in parts.items()}, scheme)["weight"].detach().float()
    out.mkdir(parents=True)
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    save_file({k: v.contiguous() for k, v in true.items()}, out / "true.values")
    group = {"targets": ["Linear"], "weights": json.loads(made.model_dump_json()), "format": kind}
    section = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": section}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
