"""Checkpoints that other programs really wrote, held against the values that those programs read out of them.

transformers is at hand. Other programs are looked for in this Python and in those named by LOWBIT_PEERS (paths of Python
interpreters, separated as in PATH), such as LOWBIT_PEERS=~/peers/gptqmodel/bin/python; their tests are skipped without.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import lowbit
from lowbit.interchange.opening import open_source
from quantized_folders import awq_layer, fp8_layer, gpt_oss, save_quantized
from tiny import TINY, save_tiny

SCRIPTS = Path(__file__).parent.parent / "foreign"
LLAMA = TINY["llama"]


@cache
def interpreter(package: str) -> str | None:
    """A Python that can import `package`."""
    for python in [sys.executable, *filter(None, os.environ.get("LOWBIT_PEERS", "").split(os.pathsep))]:
        found = subprocess.run([python, "-c", f"import {package}"], capture_output=True, check=False)
        if found.returncode == 0:
            return python
    return None


def by(package: str, source: Path, out: Path, case: Any) -> dict[str, torch.Tensor]:
    """Let another program write `out`; gives the values that it reads. Skips the test without the program."""
    python = interpreter(package)
    if python is None:
        pytest.skip(f"no Python here has {package}; name one in LOWBIT_PEERS")
    script = SCRIPTS / f"with_{package}.py"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [python, str(script), str(source), str(out), json.dumps(case)],
        cwd=out.parent, capture_output=True, text=True, timeout=900, check=False, env=env | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "true.values")


def same(folder: Path, true: dict[str, torch.Tensor], bound: float, fmt: str | None) -> None:
    """Values within `bound`, integers exact, and an import with no loss."""
    source = open_source(folder)
    assert len(true) == 14
    for name, wanted in true.items():
        found, stored = source.read(name), source.stored_as(name)
        assert float((found - wanted).norm() / wanted.norm()) <= bound, name
        assert stored is not None and (None if stored.format is None else str(stored.format)) == fmt
        assert stored.read is None or torch.equal(stored.read().dequantize(), found)
    if fmt is not None:
        made = lowbit.import_model(folder, folder.parent / "imported", tokenizer=None)
        assert all(layer.error == 0.0 for layer in made.report.layers if layer.format is not None)


@pytest.fixture
def wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Llama whose rows are 64 and 128 wide."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    monkeypatch.setitem(TINY, "llama", lambda: transformers.LlamaConfig(**LLAMA().to_dict() | sizes))
    save_tiny("llama", tmp_path / "float")
    return tmp_path / "float"


def dense(folder: Path, config: Any) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    return dict(model.state_dict())


def test_transformers_reads_the_same_fp8(tmp_path: Path) -> None:
    section = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    save_quantized(tmp_path, section, fp8_layer)
    found = dense(tmp_path, transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16)))
    source = open_source(tmp_path)
    assert all(torch.equal(source.read(name), found[name]) for name in source.tensors)


def test_transformers_reads_the_same_mxfp4(tmp_path: Path) -> None:
    gpt_oss(tmp_path)
    found, source = dense(tmp_path, transformers.Mxfp4Config(dequantize=True)), open_source(tmp_path)
    assert all(torch.equal(source.read(name), found[name]) for name in source.tensors)


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
MX = {
    "type": "float",
    "symmetric": True,
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}
NV = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16,
      "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}  # fmt: skip
COMPRESSED: dict[str, tuple[str, dict[str, Any], str, float]] = {
    "int4": ("pack-quantized", INT4, "int4:g32:s=fp32", 0),
    "int4 asym": ("pack-quantized", INT4 | {"symmetric": False}, "uint4:g32:asym:s=fp32", 0),
    "int3": ("pack-quantized", INT4 | {"num_bits": 3, "strategy": "channel", "group_size": None}, "int3:channel", 0),
    "int5 asym": ("pack-quantized", INT4 | {"num_bits": 5, "symmetric": False}, "uint5:g32:asym:s=fp32", 0),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}, "int8:channel", 0),
    "int8 asym": ("int-quantized", {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"}, "int8:channel:asym", 0),
    "float8": ("float-quantized", FLOAT8, "e4m3:channel", 0),
    "float8 tensor": ("naive-quantized", FLOAT8 | {"strategy": "tensor"}, "e4m3:tensor", 0),
    "float8 blocks": ("float-quantized", FLOAT8 | {"strategy": "block", "block_structure": [16, 16]}, "e4m3:16x16:s=fp32", 0),
    "mxfp8": ("mxfp8-quantized", MX | {"num_bits": 8}, "mxfp8", 0),
    "mxfp4": ("mxfp4-pack-quantized", MX | {"num_bits": 4}, "mxfp4", 0),
    "nvfp4": ("nvfp4-pack-quantized", NV, "nvfp4", 4e-3),  # it computes in bfloat16
}  # fmt: skip


@pytest.mark.peer
@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_tensors(case: str, wide: Path, tmp_path: Path) -> None:
    kind, args, fmt, bound = COMPRESSED[case]
    same(tmp_path / "out", by("compressed_tensors", wide, tmp_path / "out", [kind, args]), bound, fmt)


BITSANDBYTES: dict[str, tuple[dict[str, Any], str, float]] = {
    "nf4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4:g64:s=fp32", 0),
    "nf4 nested": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4:g64:s=fp32", 1e-6),
    "fp4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bnb_fp4:g64:s=fp32", 1e-6),
    "int8": ({"load_in_8bit": True}, "int8:channel", 1e-6),
}  # fmt: skip


@pytest.mark.peer
@pytest.mark.parametrize("case", BITSANDBYTES)
def test_bitsandbytes(case: str, wide: Path, tmp_path: Path) -> None:
    options, fmt, bound = BITSANDBYTES[case]
    same(tmp_path / "out", by("bitsandbytes", wide, tmp_path / "out", options), bound, fmt)


GPTQ: dict[str, tuple[dict[str, Any], str | None]] = {
    "4 bits": ({"bits": 4, "group_size": 32, "sym": True}, "int4:g32"),
    "asym": ({"bits": 4, "group_size": 32, "sym": False}, "uint4:g32:asym"),
    "by activation": ({"bits": 4, "group_size": 32, "desc_act": True, "sym": True}, None),
    "3 bits": ({"bits": 3, "group_size": 32, "sym": True}, "int3:g32"),
    "2 bits, version 2": ({"bits": 2, "group_size": 32, "sym": True, "format": "gptq_v2"}, "int2:g32"),
    "8 bits": ({"bits": 8, "group_size": 32, "sym": True}, "int8:g32"),
}


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.parametrize("case", GPTQ)
def test_gptqmodel(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "dtype": "float16",
    }
    monkeypatch.setitem(TINY, "llama", lambda: transformers.LlamaConfig(**LLAMA().to_dict() | sizes))
    save_tiny("llama", tmp_path / "float")
    options, fmt = GPTQ[case]
    same(tmp_path / "out", by("gptqmodel", tmp_path / "float", tmp_path / "out", {"desc_act": False} | options), 0, fmt)


@pytest.mark.peer
def test_gptqmodel_reads_the_same_awq(tmp_path: Path) -> None:
    section = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
    save_quantized(tmp_path / "out", section, awq_layer)
    same(tmp_path / "out", by("gptqmodel", tmp_path / "out", tmp_path / "out", {}), 1e-3, "uint4:g16:asym")  # in fp16
