"""A module in memory, the dispatch by name, and what is said when nothing fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lowbit.errors import SourceError
from lowbit.interchange.opening import open_source
from tiny import tiny_model, tiny_tokenizer


def test_a_transformers_model_in_memory(tmp_path: Path) -> None:
    model = tiny_model("llama-tied")
    source = open_source(model, tokenizer=tiny_tokenizer())
    assert source.label == "LlamaForCausalLM" and source.config is model.config
    assert all(torch.equal(source.read(name), model.state_dict()[name]) for name in source.tensors)
    assert "lm_head.weight" not in source.tensors
    source.save_assets(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file() and (tmp_path / "generation_config.json").is_file()


def test_any_module_and_its_float_copy() -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32, bias=False)).eval()
    source = open_source(model)
    assert source.config is None and list(source.tensors) == ["0.weight", "0.bias", "2.weight"]
    assert source.load_float() is model
    half = source.load_float(torch.bfloat16)
    assert half[0].weight.dtype == torch.bfloat16 and model[0].weight.dtype == torch.float32
    model.train()
    assert source.load_float() is not model and not source.load_float().training and model.training
    with pytest.raises(SourceError, match="without a tokenizer"):
        source.tokenizer()


def test_identity_follows_every_value() -> None:
    model = tiny_model("gpt2").to(torch.bfloat16)
    before = open_source(model).identity()
    assert open_source(model).identity() == before
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 4] += 1
    assert open_source(model).identity() != before


def test_a_module_without_values_is_refused() -> None:
    with pytest.raises(SourceError, match=r"'weight'.*meta device"):
        open_source(nn.Linear(4, 4, device="meta"))


@pytest.mark.parametrize("name", ["nothing-here", "./nothing/here", "model.gguf", "folder/model.gguf"])
def test_an_unknown_name_says_what_a_model_can_be(name: str) -> None:
    with pytest.raises(
        SourceError,
        match=r"(no folder or file |'\./nothing/here' is not there).*local folder.*\.gguf.*org/name.*smollm2",
    ):
        open_source(name)


def test_a_file_or_object_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match="not a .gguf file"):
        open_source(tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="cannot use a int"):
        open_source(3)  # type: ignore[arg-type]
