"""Models with quantized inputs through transformers' own loading and saving."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5ForConditionalGeneration

import lowbit
from lowbit.errors import SourceError
from lowbit.formats import InputQuantizer, parse_inputs
from lowbit.interchange.opening import open_source
from lowbit.nn.packed import PackedWeight
from lowbit.nn.swap import packed_weights
from tiny import save_tiny, tiny_model

MADE = {"input_scale": 0.05, "input_offset": 128.0, "input_divisor": 1.5}
FORMS = ["int8:token", "uint8:tensor:asym:static:divisor", "int8:g16:outliers=6", "float:divisor"]


def with_inputs(folder: Path, text: str, chosen: str = "_proj.") -> list[str]:
    """Give the linear layers of a written model quantized inputs, in its config and in its weight file."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    names = [n for n in config["quantization_config"]["tensors"] if chosen in n]
    for name in names:
        entry = config["quantization_config"]["tensors"][name]
        entry["inputs"] = text
        for part, (dtype, size) in parse_inputs(text).parts(entry["shape"][-1]).items():
            tensors[f"{name}.{part}"] = torch.full(size, MADE[part], dtype=dtype)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return names


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(10).view(1, 10)).logits
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny("llama-tied", tmp_path / "float")
    lowbit.quantize(tmp_path / "float", "int8:channel", tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("text", FORMS)
def test_it_loads_runs_and_is_saved_again(text: str, folder: Path, tmp_path: Path) -> None:
    before = logits(AutoModelForCausalLM.from_pretrained(folder))
    names = with_inputs(folder, text)
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = dict(packed_weights(model))
    assert {n for n, w in weights.items() if w.inputs is not None} == set(names) and len(names) == 14
    for name in names:
        parts = dict(weights[name].named_buffers())
        for part, (dtype, size) in parse_inputs(text).parts(weights[name].stored_shape[-1]).items():
            assert parts[part].dtype == dtype and torch.equal(parts[part], torch.full(size, MADE[part]))
    y = logits(model)
    assert y.isfinite().all() and 1e-5 < float((y - before).norm() / before.norm()) < 1.5
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), y)
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_bfloat16_leaves_the_stored_scales_alone(folder: Path) -> None:
    names = with_inputs(folder, "uint8:tensor:asym:static:divisor")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    parts = dict(dict(packed_weights(model))[names[0]].named_buffers())
    assert all(parts[p].dtype == torch.float32 for p in ("input_scale", "input_offset", "input_divisor"))
    assert logits(model).dtype == torch.bfloat16


def test_a_model_swapped_by_hand_says_the_same(folder: Path) -> None:
    """The float model with its inputs rounded by hooks and its weights expanded: no packed weight in it."""
    names = with_inputs(folder, "int8:token")
    found = logits(AutoModelForCausalLM.from_pretrained(folder))
    plain = tiny_model("llama-tied")
    for name, weight in packed_weights(AutoModelForCausalLM.from_pretrained(folder)):
        plain.get_parameter(name).data = weight.dequantize()
        if name in names:
            quantizer = InputQuantizer(parse_inputs("int8:token"))
            layer = plain.get_submodule(name.removesuffix(".weight"))
            layer.register_forward_pre_hook(lambda _, args, q=quantizer: (q.round(args[0]), *args[1:]))
    expected = logits(plain.eval())
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_a_tied_head_may_quantize_its_inputs_and_looking_up_tokens_does_not(folder: Path) -> None:
    names = with_inputs(folder, "int8:token", "embed_tokens")
    model = AutoModelForCausalLM.from_pretrained(folder)
    weight = model.lm_head.weight
    assert len(names) == 1 and isinstance(weight, PackedWeight) and weight is model.model.embed_tokens.weight
    ids = torch.arange(10)
    assert torch.equal(model.model.embed_tokens(ids), weight.dequantize()[ids])
    x = torch.randn(3, 32)
    assert not torch.equal(model.lm_head(x), x @ weight.dequantize().T)


def test_dense_again(folder: Path) -> None:
    with_inputs(folder, "float:divisor")
    model = AutoModelForCausalLM.from_pretrained(folder)
    y = logits(model)
    dense = lowbit.load(folder, kernel="dense")
    assert not list(packed_weights(dense))
    assert float((logits(dense) - y).norm() / y.norm()) < 2e-4  # 15 bits of activations
    y = logits(lowbit.load(folder, kernel="expand"))
    assert float((logits(dense) - y).norm() / y.norm()) < 1e-5


def test_inputs_that_mean_nothing_are_an_error(folder: Path) -> None:
    with_inputs(folder, "int8:token")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"inputs": "int8:token"', '"inputs": "int8:tokens"'))
    with pytest.raises(SourceError, match="int8:tokens"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_head_of_its_own_loads_where_its_class_could_tie_it(tmp_path: Path) -> None:
    config = copy.deepcopy(tiny_model("t5").config)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    plain = T5ForConditionalGeneration(config).eval()
    plain.save_pretrained(tmp_path / "float")
    made = lowbit.quantize(tmp_path / "float", "int8:channel", tmp_path / "packed")
    assert "lm_head.weight" not in made.plan.tied
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "packed")
    weights = dict(packed_weights(model))
    head, shared = weights["lm_head.weight"], weights["shared.weight"]
    assert head is not shared and not torch.equal(head.dequantize(), shared.dequantize())
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        x, y = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (plain, model))
    assert float((x - y).norm() / x.norm()) < 0.03
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids, decoder_input_ids=ids).logits, y)


@pytest.mark.parametrize("text", FORMS)
def test_as_a_source_inputs_are_told_and_a_divisor_is_in_the_values(text: str, folder: Path) -> None:
    names = with_inputs(folder, text)
    source, weights = open_source(folder), dict(packed_weights(lowbit.load(folder)))
    for name in names:
        stored = source.stored_as(name)
        assert stored is not None and stored.inputs == parse_inputs(text)
        assert {part: float(value.flatten()[0]) for part, value in stored.input_parts().items()} == {
            part: pytest.approx(MADE[part]) for part in parse_inputs(text).parts(stored.read().shape[-1])
        }
        assert torch.equal(source.read(name), weights[name].dequantize(torch.float32))
