"""Quantized checkpoints of tiny models as other programs write them, made here from their description.

Each maker takes a float layer [out, in] and gives (stored tensors by leaf name, the values they stand for), the latter by plain
loops over float64 numbers, so that readers have something to be held against that shares no code with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny import save_tiny

Made = tuple[dict[str, Tensor], Tensor]


def affine(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, in], zero-points [out, groups] and fp16 scales [out, groups] by min and max, or by the largest magnitude."""
    out, width = weight.shape
    group = width if group == -1 else group
    top = (1 << bits) - 1
    codes = torch.zeros(out, width, dtype=torch.uint8)
    groups = -(-width // group)
    zeros, scales = torch.zeros(out, groups, dtype=torch.uint8), torch.zeros(out, groups, dtype=torch.float16)
    for o in range(out):
        for g in range(groups):
            block = weight[o, g * group : (g + 1) * group]
            low, high = min(0.0, float(block.min())), max(0.0, float(block.max()))
            scale = 2 * max(-low, high) / top if symmetric else (high - low) / top
            scales[o, g] = max(scale, 1e-4)
            zero = (top + 1) // 2 if symmetric else max(0, min(top, round(-low / float(scales[o, g]))))
            zeros[o, g] = zero
            codes[o, g * group : (g + 1) * group] = (block / float(scales[o, g])).round().add(zero).clamp(0, top)
    return codes, zeros, scales


def values(codes: Tensor, zeros: Tensor, scales: Tensor, order: list[int]) -> Tensor:
    """w[o, i] = scale[o, g] * (code[o, i] - zero[o, g]) with g = order[i], one by one."""
    rows = [
        [float(scales[o, g]) * (int(codes[o, i]) - int(zeros[o, g])) for i, g in enumerate(order)]
        for o in range(codes.shape[0])
    ]
    return torch.tensor(rows, dtype=torch.float64)


def words(rows: list[list[int]], bits: int) -> Tensor:
    """Dense int32 words of each row, by one long number."""
    out = []
    for row in rows:
        number = sum(int(code) << (i * bits) for i, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        signed = [(number >> (32 * w)) & 0xFFFFFFFF for w in range(count)]
        out.append([word - (1 << 32) if word >> 31 else word for word in signed])
    return torch.tensor(out, dtype=torch.int32)


def gptq_layer(
    weight: Tensor, bits: int = 4, group: int = 16, symmetric: bool = True, version: int = 1, by_order: bool = False
) -> Made:
    codes, zeros, scales = affine(weight, bits, group, symmetric)
    width = weight.shape[1]
    size = width if group == -1 else group
    order = [i // size for i in range(width)]
    if by_order:
        shuffled = torch.randperm(width, generator=torch.Generator().manual_seed(width)).tolist()
        order = [order[i] for i in shuffled]
    top = 1 << bits
    stored = {
        "qweight": words(codes.tolist(), bits).T.contiguous(),
        "qzeros": words([[(z - (version == 1)) % top for z in column] for column in zeros.T.tolist()], bits),
        "scales": scales.T.contiguous(),
        "g_idx": torch.tensor(order, dtype=torch.int32),
    }
    return stored, values(codes, zeros, scales, order)


def awq_layer(weight: Tensor, group: int = 16) -> Made:
    codes, zeros, scales = affine(weight, 4, group, symmetric=False)
    width = weight.shape[1]

    def interleaved(columns: list[list[int]]) -> Tensor:
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return words([[row[8 * w + j] for w in range(len(row) // 8) for j in order] for row in columns], 4)

    stored = {
        "qweight": interleaved(codes.T.tolist()), "qzeros": interleaved(zeros.T.tolist()), "scales": scales.T.contiguous(),
    }  # fmt: skip
    return stored, values(codes, zeros, scales, [i // (width if group == -1 else group) for i in range(width)])


def packed_layer(
    weight: Tensor, bits: int = 4, group: int = 16, symmetric: bool = True, by_order: bool = False
) -> Made:
    """compressed-tensors, pack-quantized."""
    codes, zeros, scales = affine(weight, bits, group, symmetric)
    width = weight.shape[1]
    size = width if group == -1 else group
    order = [i // size for i in range(width)]
    stored = {"weight_packed": words(codes.tolist(), bits), "weight_scale": scales.bfloat16(),
              "weight_shape": torch.tensor(weight.shape)}  # fmt: skip
    scales = scales.bfloat16()
    if by_order:
        shuffled = torch.randperm(width, generator=torch.Generator().manual_seed(width)).tolist()
        order = [order[i] for i in shuffled]
        stored["weight_g_idx"] = torch.tensor(order, dtype=torch.int32)
    if not symmetric:
        stored["weight_zero_point"] = words(zeros.T.tolist(), bits).T.contiguous()
    return stored, values(codes, zeros, scales, order)


def save_quantized(
    folder: Path, section: dict[str, Any], layer: Callable[[Tensor], Made], model: str = "llama",
    change: Callable[[dict[str, Tensor]], Any] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """A folder of the tiny `model` whose linear layers are stored as `layer` has them. Gives the true values by name.

    `change` may spoil the stored tensors before they are written.
    """
    save_tiny(model, folder)
    floats = load_file(folder / "model.safetensors")
    stored: dict[str, Tensor] = {}
    true: dict[str, Tensor] = {}
    for name, tensor in floats.items():
        linear = "_proj" in name or ".c_attn" in name or ".c_proj" in name or ".c_fc" in name
        if not linear or tensor.dim() != 2:
            stored[name] = tensor.clone()
            continue
        turned = model == "gpt2"  # Conv1D keeps [in, out]; packers store [out, in] all the same
        made, dense = layer(tensor.T if turned else tensor)
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{leaf}" if leaf else name: part for leaf, part in made.items()}
        true[name] = dense.T if turned else dense
    if change is not None:
        change(stored)
    save_file({k: v.contiguous() for k, v in stored.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return true
