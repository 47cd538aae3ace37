"""What was split or joined while loading is put together again for writing: `dequantize` gives a folder that is the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

import lowbit
from lowbit.errors import SourceError
from lowbit.interchange.hf.models import meta_model
from lowbit.interchange.hf.published import Published
from lowbit.interchange.inventory import tied_names
from lowbit.interchange.tensors import TensorSpec
from tiny import tiny_model

BERT: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MIXTURE: dict[str, Any] = BERT | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "head_dim": 8,
}
# Whose rules take one matrix apart (q, k and v; gate and up), and one whose rules stack experts.
KINDS = {
    "NomicBertForMaskedLM": BERT, "JinaEmbeddingsV3ForMaskedLM": BERT, "GteModel": BERT,
    "Qwen3MoeForCausalLM": MIXTURE,
}  # fmt: skip


def made(kind: str) -> Any:
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    return cls(cls.config_class(architectures=[kind], **KINDS[kind])).float().eval()


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25).reshape(2, 10))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_float_folder_comes_out_as_the_same_files(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    model.save_pretrained(tmp_path / "in")
    lowbit.dequantize_model(tmp_path / "in", tmp_path / "out", dtype="float32")
    with (
        safe_open(tmp_path / "in/model.safetensors", "pt") as a,
        safe_open(tmp_path / "out/model.safetensors", "pt") as b,
    ):
        assert set(a.keys()) == set(b.keys())
        assert all(torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in a.keys())  # noqa: SIM118
    read, found = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()) and torch.equal(outputs(read.eval()), outputs(model))


def test_a_quantized_folder_of_fused_weights_is_the_same_model_in_float(tmp_path: Path) -> None:
    model = made("NomicBertForMaskedLM")
    model.save_pretrained(tmp_path / "in")
    lowbit.quantize(tmp_path / "in", "w8", tmp_path / "w8")
    lowbit.dequantize_model(tmp_path / "w8", tmp_path / "out", dtype="float32")
    read, found = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    packed = lowbit.load(tmp_path / "w8", dtype=torch.float32)
    assert not any(found.values())
    for name, weight in read.state_dict().items():
        if name.endswith("q_proj.weight"):
            assert torch.equal(weight, packed.get_submodule(name).dequantize(torch.float32))
    assert float((outputs(read.eval()) - outputs(packed)).norm() / outputs(packed).norm()) < 1e-3


def specs_of(model: Any) -> dict[str, TensorSpec]:
    tied = tied_names(model)
    return {n: TensorSpec(n, tuple(t.shape), t.dtype) for n, t in model.state_dict().items() if n not in tied}


def test_rules_that_cannot_be_turned_round_leave_the_names_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace("q_proj", "elsewhere"): tensor for name, tensor in tensors.items()}

    model = meta_model(tiny_model("llama").config)
    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", broken)
    published = Published(model, specs_of(model), "here")
    assert [g.names for g in published.groups] == [tuple(g.pieces) for g in published.groups]
    assert [g.names[0] for g in published.groups] == list(specs_of(model))


def test_values_that_do_not_come_back_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import core_model_loading as rules

    true, model = rules.revert_weight_conversion, meta_model(made("NomicBertForMaskedLM").config)
    specs = specs_of(model)
    published = Published(model, specs, "here")
    group = next(g for g in published.groups if len(g.names) == 3 and g.names[0].endswith("weight"))
    values = {name: torch.randn(specs[name].shape) for name in group.names}
    assert published.tensors(group, values)
    monkeypatch.setattr(rules, "revert_weight_conversion", lambda m, t: {n: v.flip(0) for n, v in true(m, t).items()})
    with pytest.raises(SourceError, match="does not come back"):
        published.tensors(group, values)
