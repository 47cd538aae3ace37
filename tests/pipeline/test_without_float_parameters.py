"""Models whose every parameter is packed, such as OLMo and NanoChat, have a device and a type, generate and are saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.nn.swap import packed_weights
from tiny import VOCAB, tiny_tokenizer

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
KINDS = {"olmo": ("OlmoConfig", "OlmoForCausalLM"), "nanochat": ("NanoChatConfig", "NanoChatForCausalLM")}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config, cls = (getattr(transformers, name) for name in KINDS[request.param])
    torch.manual_seed(0)
    cls(config(**SIZES, architectures=[cls.__name__])).save_pretrained(tmp_path / "in")
    tiny_tokenizer().save_pretrained(tmp_path / "in")
    report = lowbit.quantize(tmp_path / "in", "w8", tmp_path / "w8", effort="none").report
    assert report.coverage == 1
    return tmp_path / "w8"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 15)[None]).logits.float()


def test_it_has_a_device_and_a_type(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not sum(p.numel() for p in model.parameters()) and not [k for k in model.state_dict() if k.endswith(".like")]
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert model.model.dtype == torch.float32
    exact = logits(model)
    before = {name: weight.qtensor().parts() for name, weight in packed_weights(model)}
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and (logits(model) - exact).norm() < 0.05 * exact.norm()
    for name, weight in packed_weights(model):
        assert all(torch.equal(part, before[name][key]) for key, part in weight.qtensor().parts().items())
    assert copy.deepcopy(model).dtype == torch.bfloat16
    assert model.to("meta").device.type == "meta"


def test_it_generates(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(torch.arange(5, 15)[None], max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= 14
    said = transformers.pipeline("text-generation", model=str(folder), max_new_tokens=4, do_sample=False)("the man")
    assert said[0]["generated_text"].startswith("the man")
    assert (
        lowbit.Engine is not None
        and lowbit.load(folder).generate("the man", max_new_tokens=4, raw=True).text is not None
    )


def test_it_is_saved_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()) and again.dtype == torch.float32
    assert torch.equal(logits(again), logits(model))
    state = model.state_dict()
    again.load_state_dict(state)  # strict
    made = lowbit.quantize(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in"), "w8", effort="none"
    ).model
    assert made.device.type == "cpu" and torch.equal(logits(made), logits(model))
    made.save_pretrained(tmp_path / "memory")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "memory")), logits(model))
