"""Quantized checkpoints of tiny models as other programs write them, made here from their description.

Each maker takes a float layer [out, in] and gives (stored tensors by leaf name, the values they stand for), the latter by plain
loops over float64 numbers, so that readers have something to be held against that shares no code with them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
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


def e4m3(byte: int) -> float:
    """OCP FP8 E4M3 by its definition: sign, four exponent bits (bias 7), three bits of mantissa; no infinities."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nearest(table: Sequence[float], value: float) -> int:
    return min(range(len(table)), key=lambda i: (abs(table[i] - value), i))


def fp8_layer(weight: Tensor, rows: int = 16, cols: int = 16, leaf: str = "weight_scale_inv") -> Made:
    """FP8 in blocks of rows x cols (the last ones may be short), as DeepSeek stores it."""
    out, width = weight.shape
    scales = torch.zeros(-(-out // rows), -(-width // cols))
    stored = torch.zeros(out, width, dtype=torch.float8_e4m3fn)
    true = torch.zeros(out, width, dtype=torch.float64)
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            place = slice(r * rows, (r + 1) * rows), slice(c * cols, (c + 1) * cols)
            scales[r, c] = max(float(weight[place].abs().max()), 1e-6) / 448
            stored[place] = (weight[place] / scales[r, c]).to(torch.float8_e4m3fn)
            raw = stored[place].view(torch.uint8)
            true[place] = torch.tensor([[e4m3(b) for b in row] for row in raw.tolist()]) * float(scales[r, c])
    return {"weight": stored, leaf: scales}, true


def fp8_rows(weight: Tensor) -> Made:
    return fp8_layer(weight, 1, weight.shape[1], "weight_scale")


def int8_layer(weight: Tensor) -> Made:
    """compressed-tensors, int-quantized: one scale a row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    true = [[q * float(s) for q in row] for row, s in zip(codes.tolist(), scale)]
    return {"weight": codes, "weight_scale": scale}, torch.tensor(true, dtype=torch.float64)


def bnb_int8_layer(weight: Tensor) -> Made:
    most = weight.abs().amax(1)
    codes = (weight * (127 / most[:, None])).round().to(torch.int8)
    true = [[q * float(s) / 127 for q in row] for row, s in zip(codes.tolist(), most)]
    stored = {"weight": codes, "SCB": most, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, torch.tensor(true, dtype=torch.float64)


def fp4_layer(weight: Tensor, group: int, two_level: bool) -> Made:
    """nvfp4 (scales in e4m3 over one float) and mxfp4 (scales are powers of two) of compressed-tensors."""
    out, width = weight.shape
    whole = 448 * 6 / float(weight.abs().max())
    codes, true = [], torch.zeros(out, width, dtype=torch.float64)
    scales = torch.zeros(out, width // group, dtype=torch.uint8)
    for o in range(out):
        row = []
        for g in range(width // group):
            block = weight[o, g * group : (g + 1) * group].tolist()
            most = max(map(abs, block)) / 6
            if two_level:
                byte = int(torch.tensor(most * whole).to(torch.float8_e4m3fn).view(torch.uint8))
                scale = e4m3(byte) / whole
            else:
                byte = 127 + math.floor(math.log2(most))
                scale = 2.0 ** (byte - 127)
            scales[o, g] = byte
            for k, w in enumerate(block):
                code = nearest(E2M1, abs(w) / scale) + (8 if w < 0 else 0)
                row.append(code)
                true[o, g * group + k] = E2M1[code & 7] * scale * (-1 if code & 8 else 1)
        codes.append([row[i] | (row[i + 1] << 4) for i in range(0, width, 2)])
    stored = {"weight_packed": torch.tensor(codes, dtype=torch.uint8), "weight_scale": scales}
    if two_level:
        stored |= {"weight_scale": scales.view(torch.float8_e4m3fn), "weight_global_scale": torch.tensor([whole])}
    return stored, true


NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(s * v / 12 for s in (1, -1) for v in _TWELFTHS)


def bnb4_layer(weight: Tensor, kind: str = "nf4", nested: bool = False, size: int = 32) -> Made:
    """Blocks over the flat weight, the first of two codes in the high nibble."""
    table = torch.tensor(NF4 if kind == "nf4" else FP4).tolist()
    flat = weight.reshape(-1).tolist()
    blocks = [flat[i : i + size] for i in range(0, len(flat), size)]
    most = torch.tensor([max(map(abs, block)) for block in blocks])
    state: dict[str, Any] = {"quant_type": kind, "blocksize": size, "dtype": "float32", "shape": list(weight.shape)}
    stored: dict[str, Tensor] = {"weight.absmax": most}
    if nested:
        offset, levels = float(most.mean()), torch.linspace(-1, 1, 256)
        outer = [max(map(abs, (most[i : i + 4] - offset).tolist())) for i in range(0, len(most), 4)]
        kept = [nearest(levels.tolist(), (float(m) - offset) / outer[i // 4]) for i, m in enumerate(most)]
        most = torch.tensor([float(levels[k]) * outer[i // 4] + offset for i, k in enumerate(kept)])
        state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": offset}
        stored = {"weight.absmax": torch.tensor(kept, dtype=torch.uint8), "weight.nested_absmax": torch.tensor(outer),
                  "weight.nested_quant_map": levels}  # fmt: skip
    codes = [nearest(table, w / float(most[i])) for i, block in enumerate(blocks) for w in block]
    true = [table[c] * float(most[i // size]) for i, c in enumerate(codes)]
    text = json.dumps(state).encode()
    stored |= {
        "weight": torch.tensor([[codes[i] << 4 | codes[i + 1]] for i in range(0, len(codes), 2)], dtype=torch.uint8),
        "weight.quant_map": torch.tensor(table),
        f"weight.quant_state.bitsandbytes__{kind}": torch.frombuffer(bytearray(text), dtype=torch.uint8),
    }
    return stored, torch.tensor(true, dtype=torch.float64).view(weight.shape)


_LINEAR = re.compile(r"(_proj|\.c_attn|\.c_proj|\.c_fc|\.w[123])\.weight$")


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
        if not _LINEAR.search(name) or tensor.dim() != 2:
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


def gpt_oss(folder: Path) -> dict[str, Tensor]:
    """A tiny gpt-oss whose experts are stored as mxfp4, as OpenAI published it. Gives the true values by name."""
    config = transformers.GptOssConfig(
        architectures=["GptOssForCausalLM"], vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=3, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GptOssForCausalLM(config).save_pretrained(folder)
    stored, true = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = tensor
            continue
        made = [fp4_layer(expert.T, 32, False) for expert in tensor]  # the model keeps [in, out]
        packed = torch.stack([m[0]["weight_packed"] for m in made])
        stored[f"{name}_blocks"] = packed.view(*packed.shape[:2], -1, 16)
        stored[f"{name}_scales"] = torch.stack([m[0]["weight_scale"] for m in made])
        true[name] = torch.stack([m[1].T for m in made])
    save_file({k: v.contiguous() for k, v in stored.items()}, folder / "model.safetensors", {"format": "pt"})
    section = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    text = json.loads((folder / "config.json").read_text()) | {"quantization_config": section}
    (folder / "config.json").write_text(json.dumps(text))
    return true
