"""Quantized checkpoints as sources: the right values, the same integers, and errors that name what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_folders import Made, awq_layer, gptq_layer, packed_layer, save_quantized
from torch import Tensor

from lowbit.interchange.source import open_source


def gptq(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True} | changes


def compressed(bits: int = 4, group: int = 16, symmetric: bool = True, **changes: Any) -> dict[str, Any]:
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
    }  # fmt: skip
    section = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
               "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}  # fmt: skip
    return section | changes


Case = tuple[dict[str, Any], Callable[[Tensor], Made], str | None]
CASES: dict[str, Case] = {}
for _bits in (2, 3, 4, 8):
    for _symmetric in (True, False):
        _fmt = f"int{_bits}:g16" if _symmetric else f"uint{_bits}:g16:asym"
        for _version in (1, 2) if _bits == 4 else (1,):
            CASES[f"gptq {_bits} sym={_symmetric} v{_version}"] = (
                gptq(bits=_bits, sym=_symmetric, checkpoint_format="gptq" if _version == 1 else "gptq_v2"),
                lambda w, b=_bits, s=_symmetric, v=_version: gptq_layer(w, b, 16, s, v),
                _fmt,
            )  # fmt: skip
        CASES[f"packed {_bits} sym={_symmetric}"] = (
            compressed(_bits, symmetric=_symmetric), lambda w, b=_bits, s=_symmetric: packed_layer(w, b, 16, s), f"{_fmt}:s=bf16",
        )  # fmt: skip
CASES |= {
    "gptq rows": (gptq(group_size=-1), lambda w: gptq_layer(w, group=-1), "int4:channel:s=fp16"),
    "gptq desc_act": (gptq(desc_act=True), lambda w: gptq_layer(w, by_order=True), None),
    "gptq desc_act asym": (gptq(desc_act=True, sym=False), lambda w: gptq_layer(w, symmetric=False, by_order=True), None),
    "gptq desc_act, groups in order": (gptq(desc_act=True), lambda w: gptq_layer(w), "int4:g16"),
    "gptq dynamic": (
        gptq(bits=8, sym=False, dynamic={r"+:model\..*": {"bits": 4, "sym": True}}), lambda w: gptq_layer(w), "int4:g16",
    ),
    "auto-round": (
        {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": True, "packing_format": "auto_round:auto_gptq"},
        lambda w: gptq_layer(w), "int4:g16",
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}, awq_layer, "uint4:g16:asym"),
    "awq rows": (
        {"quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": True, "version": "GEMM"},
        lambda w: awq_layer(w, -1), "uint4:channel:asym:s=fp16",
    ),
    "packed rows": (compressed(group=-1), lambda w: packed_layer(w, group=-1), "int4:channel:s=bf16"),
    "packed actorder": (compressed(), lambda w: packed_layer(w, by_order=True), None),
    "packed actorder asym": (compressed(symmetric=False), lambda w: packed_layer(w, symmetric=False, by_order=True), None),
    "packed 5 bits": (compressed(5), lambda w: packed_layer(w, 5), "int5:g16:s=bf16"),
    "packed 6 bits": (compressed(6), lambda w: packed_layer(w, 6), "int6:g16:s=bf16"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_values_and_integers_are_those_of_the_description(case: str, tmp_path: Path) -> None:
    section, layer, fmt = CASES[case]
    true = save_quantized(tmp_path, section, layer)
    source = open_source(tmp_path)
    assert (
        source.storage.startswith(section["quant_method"])
        and source.config.to_dict().get("quantization_config") is None
    )
    assert source.disk_bytes() < sum(spec.nbytes for spec in source.tensors.values())
    assert len(true) == 14
    for name, dense in true.items():
        assert source.tensors[name].dtype == torch.float32
        assert torch.allclose(source.read(name).double(), dense, rtol=1e-6, atol=1e-7), name
        stored = source.stored_as(name)
        assert stored is not None and (None if stored.format is None else str(stored.format)) == fmt
        if fmt is None:
            assert "not consecutive" in stored.why
        else:
            assert stored.read is not None and torch.equal(stored.read().dequantize(), source.read(name))
    assert source.stored_as("model.norm.weight") is None and source.stored_as("model.embed_tokens.weight") is None
    model = source.load_float()
    assert torch.equal(
        model.state_dict()["model.layers.0.mlp.up_proj.weight"], source.read("model.layers.0.mlp.up_proj.weight")
    )
