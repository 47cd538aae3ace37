"""Quantized checkpoints as sources: the right values, the same integers, and errors that name what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lowbit
from lowbit.errors import SourceError
from lowbit.interchange.checks.foreign import METHODS
from lowbit.interchange.opening import open_source
from lowbit.interchange.readers.quantized import schemes
from lowbit.nn.swap import packed_weights
from quantized_folders import (
    Made,
    awq_layer,
    bnb4_layer,
    bnb_int8_layer,
    fp4_layer,
    fp8_layer,
    fp8_rows,
    gpt_oss,
    gptq_layer,
    int8_layer,
    packed_layer,
    save_quantized,
)
from tiny import save_tiny


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


def other(kind: str, group: int | None, strategy: str, **weights: Any) -> dict[str, Any]:
    """compressed-tensors in a format other than packed words."""
    section = compressed(format=kind)
    section["config_groups"]["group_0"] = {
        "targets": ["re:.*_proj$"], "weights": {"symmetric": True, "strategy": strategy, "group_size": group, **weights},
    }  # fmt: skip
    return section


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
CASES |= {
    "int8": (other("int-quantized", None, "channel", num_bits=8, type="int"), int8_layer, "int8:channel"),
    "float8 rows": (other("float-quantized", None, "channel", num_bits=8, type="float"), fp8_rows, "e4m3:channel"),
    "float8 blocks": (
        other("float-quantized", None, "block", num_bits=8, type="float", block_structure=[16, 16]),
        lambda w: fp8_layer(w, leaf="weight_scale"), "e4m3:16x16:s=fp32",
    ),
    "nvfp4": (
        other("nvfp4-pack-quantized", 16, "tensor_group", num_bits=4, type="float"), lambda w: fp4_layer(w, 16, True), "nvfp4",
    ),
    "mxfp4": (
        other("mxfp4-pack-quantized", 32, "group", num_bits=4, type="float"), lambda w: fp4_layer(w, 32, False), "mxfp4",
    ),
    "fp8": (FP8, fp8_layer, "e4m3:16x16:s=fp32"),
    "fp8, short last blocks": (FP8 | {"weight_block_size": [24, 24]}, lambda w: fp8_layer(w, 24, 24), "e4m3:24x24:s=fp32"),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, fp8_rows, "e4m3:channel"),
    "nf4": (BNB, bnb4_layer, "nf4:g32:s=fp32"),
    "nf4 nested": (BNB, lambda w: bnb4_layer(w, nested=True), "nf4:g32:s=fp32"),
    "fp4": (BNB, lambda w: bnb4_layer(w, "fp4"), "bnb_fp4:g32:s=fp32"),
    "bnb int8": (BNB | {"llm_int8_threshold": 6.0}, bnb_int8_layer, "int8:channel"),
}  # fmt: skip
# What becomes of the inputs in the program that wrote the weights.
INPUTS = {
    "fp8": "e4m3:g16",
    "fp8, short last blocks": "e4m3:g24",
    "fbgemm": "e4m3:token",
    "bnb int8": "int8:token:outliers=6",
}


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
        assert torch.allclose(source.read(name).double(), dense, rtol=2e-6, atol=1e-7), name
        stored = source.stored_as(name)
        assert stored is not None and (None if stored.format is None else str(stored.format)) == fmt
        if fmt is None:
            assert "not consecutive" in stored.why
            continue
        assert stored.read is not None and torch.equal(stored.read().dequantize(), source.read(name))
        assert (None if stored.inputs is None else str(stored.inputs)) == INPUTS.get(case)
    assert source.stored_as("model.norm.weight") is None and source.stored_as("model.embed_tokens.weight") is None
    model = source.load_float()
    assert torch.equal(
        model.state_dict()["model.layers.0.mlp.up_proj.weight"], source.read("model.layers.0.mlp.up_proj.weight")
    )


def test_blocks_that_run_over_the_ends_of_rows_are_read_as_values(tmp_path: Path) -> None:
    true = save_quantized(tmp_path, BNB, lambda w: bnb4_layer(w, size=64))
    source = open_source(tmp_path)
    for name, dense in true.items():
        stored = source.stored_as(name)
        assert torch.allclose(source.read(name).double(), dense, rtol=1e-6, atol=1e-7) and stored is not None
        assert (stored.format is None) == (dense.shape[1] == 32) and ("ends of rows of 32" in stored.why) == (
            dense.shape[1] == 32
        )


def test_modules_that_keep_their_weights_turned(tmp_path: Path) -> None:
    true = save_quantized(tmp_path, gptq(), gptq_layer, model="gpt2")
    source = open_source(tmp_path)
    assert "transformer.h.0.attn.c_attn.weight" in source.tensors
    for name, dense in true.items():
        full = name if name in source.tensors else f"transformer.{name}"
        stored = source.stored_as(full)
        assert torch.allclose(source.read(full).double(), dense, rtol=1e-6, atol=1e-7)
        assert stored is not None and stored.read is not None and source.inventory.params[full].transposed
        assert torch.equal(stored.read().dequantize().T, source.read(full))


@pytest.mark.parametrize("model", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("kind", ["gptq", "gptq asym", "nvfp4"])
def test_experts_are_stacked_as_integers_where_rows_keep_their_scales(model: str, kind: str, tmp_path: Path) -> None:
    section, layer = {
        "gptq": (gptq(), gptq_layer), "gptq asym": (gptq(sym=False), lambda w: gptq_layer(w, symmetric=False)),
        "nvfp4": (CASES["nvfp4"][0], CASES["nvfp4"][1]),
    }[kind]  # fmt: skip
    if kind == "nvfp4":
        section["config_groups"]["group_0"]["targets"] = ["Linear"]
    true = save_quantized(tmp_path, section, layer, model=model)
    source = open_source(tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    gate, up = ("w1", "w3") if model == "mixtral" else ("gate_proj", "up_proj")
    prefix = "model.layers.1.block_sparse_moe" if model == "mixtral" else "model.layers.1.mlp"
    wanted = torch.stack(
        [torch.cat([true[f"{prefix}.experts.{e}.{part}.weight"] for part in (gate, up)]) for e in range(4)]
    )
    assert torch.allclose(source.read(name).double(), wanted, rtol=2e-6, atol=1e-7)
    stored = source.stored_as(name)
    assert stored is not None
    if kind == "nvfp4":  # each expert has a scale of its own over all of its rows
        assert stored.format is None and "spans rows" in stored.why
        return
    assert stored.read is not None and torch.equal(stored.read().dequantize(), source.read(name))
    assert stored.format is not None and str(stored.format) == ("int4:g16" if kind == "gptq" else "uint4:g16:asym")


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    true = gpt_oss(tmp_path)
    stored, source = load_file(tmp_path / "model.safetensors"), open_source(tmp_path)
    assert len(true) == 4
    for name, dense in true.items():
        assert torch.equal(source.read(name).double(), dense)
        found = source.stored_as(name)
        assert found is not None and str(found.format) == "mxfp4" and found.read is not None
        assert torch.equal(found.read().dequantize(), source.read(name).transpose(1, 2))
        assert torch.equal(found.read().codes.view(-1), stored[f"{name}_blocks"].view(-1))  # not a bit is moved


def test_a_folder_of_lowbit_is_a_source(tmp_path: Path) -> None:
    model = save_tiny("llama-tied", tmp_path / "float")
    lowbit.quantize(tmp_path / "float", "w4", tmp_path / "w4", effort="none")
    source, packed = open_source(tmp_path / "w4"), lowbit.load(tmp_path / "w4")
    assert (
        source.storage == "lowbit, search@int4:g32"
        and source.config.tie_word_embeddings == model.config.tie_word_embeddings
    )
    for name, weight in packed_weights(packed):
        stored = source.stored_as(name)
        assert stored is not None and stored.read is not None and stored.format == weight.format
        assert torch.equal(stored.read().codes, weight.qtensor().codes) and torch.equal(
            source.read(name), weight.dequantize()
        )


def test_kept_scales_of_a_cache_and_inputs_that_cannot_be_kept_are_named(tmp_path: Path) -> None:
    section = CASES["int8"][0] | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    section["config_groups"]["group_0"]["input_activations"] = activations

    def with_scales(stored: dict[str, Tensor]) -> None:
        for name in [n for n in stored if n.endswith("_proj.weight_scale")]:
            stored[name.replace("weight_scale", "input_scale")] = torch.tensor([0.5])
        stored["model.layers.0.self_attn.k_scale"] = torch.tensor([0.1])
        del stored["model.layers.1.mlp.up_proj.input_scale"]

    save_quantized(tmp_path, section, int8_layer, change=with_scales)
    source = open_source(tmp_path)
    assert source.dropped == ("model.layers.0.self_attn.k_scale",)
    stored = source.stored_as("model.layers.0.mlp.up_proj.weight")
    assert (
        stored is not None
        and str(stored.inputs) == "int8:tensor:static"
        and stored.input_parts()["input_scale"].item() == 0.5
    )
    left = source.stored_as("model.layers.1.mlp.up_proj.weight")
    assert left is not None and left.inputs is None and "never calibrated" in left.note


NAME = "model.layers.0.mlp.down_proj"


def _lose(leaf: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda stored: stored.pop(f"{NAME}.{leaf}")


def _replace(leaf: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda stored: stored.update({f"{NAME}.{leaf}": value(stored[f"{NAME}.{leaf}"])})


DAMAGED: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "no scales": ("gptq 4 sym=True v1", _lose("scales"), r"down_proj.scales' is missing"),
    "no zeros": ("awq", _lose("qzeros"), r"down_proj.qzeros' is missing"),
    "scales of another layer": (
        "gptq 4 sym=True v1",
        _replace("scales", lambda t: t[:, :-1]),
        r"down_proj.scales' has the shape",
    ),
    "too few groups": ("awq", _replace("scales", lambda t: t[:-1]), r"qzeros' has the shape|3 groups for 64"),
    "words of a float": ("awq", _replace("qweight", lambda t: t.float()), r"down_proj.qweight' is torch.float32"),
    "g_idx too short": ("gptq 4 sym=True v1", _replace("g_idx", lambda t: t[:-1]), r"down_proj"),
    "scales of integers": ("gptq 4 sym=True v1", _replace("scales", lambda t: t.int()), r"is no type of a scale"),
    "packed width": ("packed 4 sym=True", _replace("weight_shape", lambda t: t * 9), r"weight_shape' says"),
    "packed without scale": ("packed 4 sym=False", _lose("weight_zero_point"), r"weight_zero_point' is missing"),
    "fp4 of another width": ("nvfp4", _replace("weight_packed", lambda t: t[:, :-1]), r"down_proj"),
    "fp8 without scale": ("fp8", _lose("weight_scale_inv"), r"has no .*weight_scale_inv'"),
    "fp8 of other blocks": (
        "fp8",
        _replace("weight_scale_inv", lambda t: t[:, :-1]),
        r"weight_scale_inv' has the shape",
    ),
    "bnb state": ("nf4", _replace("weight.quant_state.bitsandbytes__nf4", lambda t: t[:-3]), r"is no JSON"),
    "bnb codes": ("nf4", _replace("weight", lambda t: t[:-3]), r"do not hold \[32, 64\] codes"),
    "bnb scales": ("nf4 nested", _replace("weight.nested_absmax", lambda t: t[:-1]), r"nested_absmax' has the shape"),
    "bnb int8 scales": ("bnb int8", _lose("SCB"), r"down_proj"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_one_error_that_names_the_tensor(case: str, tmp_path: Path) -> None:
    kind, spoil, said = DAMAGED[case]
    section, layer, _ = CASES[kind]
    save_quantized(tmp_path, section, layer, change=spoil)
    with pytest.raises(SourceError, match=said) as caught:
        source = open_source(tmp_path)
        source.read(f"{NAME}.weight")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


SECTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "layout": (gptq(checkpoint_format="marlin"), "laid out as 'marlin'"),
    "row_parts": (gptq(bits=5, checkpoint_format="gptq_p"), "laid out as 'gptq_p'"),
    "bits": (gptq(bits="four"), "quantization_config.bits is 'four', and it must be a whole number"),
    "group": (gptq(group_size=24), "4 groups for 64 inputs, which groups of 24"),
    "symmetry": (gptq(sym=True, checkpoint_format="gptq_v2"), "zero-points off the middle"),
    "awq gemv": ({"quant_method": "awq", "version": "gemv", "bits": 4, "group_size": 16}, "'gemv' layout"),
    "awq without zeros": (
        {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": False},
        "without zero-points",
    ),
    "sparse": (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "stored sparsely"),
    "no method": ({"bits": 4}, "an unnamed method"),
}


@pytest.mark.parametrize("case", SECTIONS)
def test_a_config_that_cannot_be_followed_is_one_error(case: str, tmp_path: Path) -> None:
    section, said = SECTIONS[case]
    save_quantized(tmp_path, section, gptq_layer)
    with pytest.raises(SourceError, match=said):
        source = open_source(tmp_path)
        stored = source.stored_as(f"{NAME}.weight")
        assert stored is not None and stored.read is not None
        stored.read()


def test_a_module_that_no_group_names_is_an_error(tmp_path: Path) -> None:
    section = compressed()
    section["config_groups"]["group_0"]["targets"] = ["re:.*q_proj"]
    save_quantized(tmp_path, section, packed_layer)
    with pytest.raises(SourceError, match=r"no config_groups of config.json names"):
        open_source(tmp_path)


def test_the_section_of_every_scheme_is_checked_at_the_door() -> None:
    assert schemes().keys() - {"lowbit"} <= METHODS.keys()  # lowbit's own has `checks/section.py`
