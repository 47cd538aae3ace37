"""Damaged GGUF and safetensors files are read or refused: no crash, no hang, no huge allocation, no error but lowbit's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowbit
from quantized_folders import awq_layer, bnb4_layer, fp4_layer, fp8_layer, gptq_layer, packed_layer, save_quantized
from tiny import save_tiny

WORKER = Path(__file__).parent / "fuzz_worker.py"
FEW, MANY, AT_ONCE = 88, 2200, 550
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16}
NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}


def compressed(kind: str, weights: dict[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}


FOLDERS = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}, gptq_layer),
    "act": ({"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": True}, lambda w: gptq_layer(w, by_order=True)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}, awq_layer),
    "packed": (compressed("pack-quantized", WEIGHTS), lambda w: packed_layer(w, symmetric=False)),
    "nvfp4": (compressed("nvfp4-pack-quantized", NVFP4), lambda w: fp4_layer(w, 16, True)),
    "bnb": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, lambda w: bnb4_layer(w, nested=True)),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 16]}, fp8_layer),
}  # fmt: skip


def write_gguf(path: Path, kinds: tuple[str, ...]) -> None:
    """A llama of one layer with a tokenizer; its matrices have these types in turn."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    wide = 256 if any(kind.endswith("_K") or kind == "IQ4_XS" for kind in kinds) else 32
    out, rng, half = GGUFWriter(path, "llama"), np.random.default_rng(0), wide // 2
    (
        out.add_block_count(1),
        out.add_context_length(64),
        out.add_embedding_length(wide),
        out.add_feed_forward_length(wide),
    )
    out.add_head_count(4), out.add_head_count_kv(2), out.add_layer_norm_rms_eps(1e-5), out.add_rope_freq_base(10000.0)
    tokens = [chr(code) for code in range(33, 127)] + ["ab"]
    out.add_vocab_size(len(tokens))
    out.add_tokenizer_model("gpt2"), out.add_tokenizer_pre("default"), out.add_token_list(tokens)
    (
        out.add_token_types([1] * len(tokens)),
        out.add_token_merges(["a b"]),
        out.add_bos_token_id(1),
        out.add_eos_token_id(2),
    )
    out.add_tensor("token_embd.weight", rng.standard_normal((len(tokens), wide)).astype(np.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        out.add_tensor(f"{name}.weight", np.ones(wide, np.float32))
    rows = {
        "attn_q": wide,
        "attn_k": half,
        "attn_v": half,
        "attn_output": wide,
        "ffn_gate": wide,
        "ffn_up": wide,
        "ffn_down": wide,
    }
    for i, (name, count) in enumerate(rows.items()):
        kind = GGMLQuantizationType[kinds[i % len(kinds)]]
        block, size = GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 60, (count, wide // block * size), dtype=np.uint8)
        out.add_tensor(f"blk.0.{name}.weight", raw, raw_dtype=kind)
    out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file(), out.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    for name, (section, layer) in FOLDERS.items():
        save_quantized(root / name, section, layer)
    save_tiny("llama", root / "float")
    lowbit.quantize(root / "float", "w4", root / "lowbit")
    for name, kinds in {
        "gguf": ("Q4_0", "Q8_0", "Q5_1", "IQ4_NL"),
        "k-quants": ("Q4_K", "Q6_K", "Q3_K", "IQ2_XXS"),
    }.items():
        (root / name).mkdir()
        write_gguf(root / name / "model.gguf", kinds)
    return root


def run(models: Path, first: int, last: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(WORKER), str(models), str(first), str(last)],
        capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(found: dict[str, Any], count: int) -> None:
    shown = "\n\n".join(
        f"input {number} ({model}): {what}\n{where}" for number, model, what, where in found["wrong"][:12]
    )
    assert not found["wrong"], f"{len(found['wrong'])} of {count} inputs\n{shown}"
    assert (
        sum(found["counts"].values()) == count
        and min(found["counts"].get(key, 0) for key in ("read", "refused")) > count / 50
    )


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by Linux's means")
def test_a_few_damaged_files(models: Path) -> None:
    check(run(models, 0, FEW), FEW)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by Linux's means")
@pytest.mark.parametrize("first", range(0, MANY, AT_ONCE))
def test_many_damaged_files(models: Path, first: int) -> None:
    check(run(models, first, first + AT_ONCE), AT_ONCE)
