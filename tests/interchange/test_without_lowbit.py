"""A folder of lowbit where transformers does not know lowbit: an error that says what to do, never random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.quantizers import auto

import lowbit
from lowbit.nn.packed import PackedWeight
from tiny import save_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "model")
    lowbit.quantize(tmp_path / "model", "w8", tmp_path / "w8")
    return tmp_path / "w8"


@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "AutoModel", "LlamaForCausalLM"])
def test_transformers_alone_refuses_in_words(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lowbit.interchange.hf.quantizer as ours

    ours.register()
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "lowbit")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "lowbit")
    with pytest.raises((ValueError, OSError), match=r"pip install lowbit.*import lowbit"):
        getattr(transformers, kind).from_pretrained(folder)


def test_with_lowbit_the_words_are_gone_and_stay_gone(folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, PackedWeight)
    assert not hasattr(model.config, "transformers_weights")
    lowbit.dequantize_model(folder, tmp_path / "float", dtype="float32")
    lowbit.quantize(tmp_path / "model", "int4:g32,embed=keep", tmp_path / "w4")
    lowbit.export(tmp_path / "w4", "vllm", tmp_path / "vllm")
    for out in ("float", "vllm"):
        assert "transformers_weights" not in json.loads((tmp_path / out / "config.json").read_text())
    # What transformers itself saves of the packed model is as good as before.
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_part_of_a_model_is_refused_too_and_loads_with_lowbit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 128, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 16, "patch_size": 8})
    transformers.CLIPModel(config).save_pretrained(tmp_path / "model")
    lowbit.quantize(tmp_path / "model", "w8", tmp_path / "w8", effort="none")
    part = transformers.CLIPTextModel.from_pretrained(tmp_path / "w8")
    assert isinstance(part.encoder.layers[0].self_attn.q_proj.weight, PackedWeight)
    again = transformers.CLIPModel.from_pretrained(tmp_path / "w8")
    again.save_pretrained(tmp_path / "again")
    assert isinstance(
        transformers.CLIPTextModel.from_pretrained(tmp_path / "again").get_input_embeddings().weight, PackedWeight
    )
    lowbit.dequantize_model(tmp_path / "w8", tmp_path / "float")
    assert "quantization_config" not in (tmp_path / "float/config.json").read_text()
    plain = transformers.CLIPTextModel.from_pretrained(tmp_path / "float")
    assert not any(isinstance(module, PackedWeight) for module in plain.modules())
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "lowbit")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "lowbit")
    with pytest.raises((ValueError, OSError), match=r"pip install lowbit.*import lowbit"):
        transformers.CLIPTextModel.from_pretrained(tmp_path / "w8")
