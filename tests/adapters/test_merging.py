"""Merging without peft: the written-out formula, the same bytes by every way, and what a quantized base becomes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lowbit
from handmade_adapters import factors, llama_factors, write
from lowbit.adapters import changes
from lowbit.adapters.source import AdaptedSource
from lowbit.convert.dequantizing import Dequantized
from lowbit.convert.merging import as_before
from lowbit.errors import LowbitError, OutputError, RecipeError, SourceError
from lowbit.interchange.files import folder_writer
from lowbit.interchange.opening import open_source

Q = "model.layers.1.self_attn.q_proj"


def test_the_sum_is_the_formula(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    tensors = llama_factors()
    base = open_source(tiny_folder("llama"))
    for settings, scale in (
        ({}, 8 / 4),
        ({"use_rslora": True}, 8 / math.sqrt(4)),
        ({"alpha_pattern": {"q_proj": 2}}, 2 / 4),
    ):
        both = lowbit.with_adapter(tiny_folder("llama"), write(tmp_path / "a", tensors, **settings))
        a, b = (tensors[f"base_model.model.{Q}.lora_{side}.weight"].double() for side in "AB")
        wanted = (base.read(f"{Q}.weight").double() + scale * b @ a).float()
        assert torch.equal(both.read(f"{Q}.weight"), wanted)
        assert torch.equal(both.read("model.norm.weight"), base.read("model.norm.weight"))
        assert isinstance(both, AdaptedSource) and len(both.changed()) == 4


def test_dora_is_equation_5(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    tensors = factors({Q: (32, 32)})
    tensors[f"base_model.model.{Q}.lora_magnitude_vector"] = torch.rand(32) + 0.5
    both = lowbit.with_adapter(tiny_folder("llama"), write(tmp_path / "a", tensors, use_dora=True))
    a, b = (tensors[f"base_model.model.{Q}.lora_{side}.weight"].double() for side in "AB")
    total = open_source(tiny_folder("llama")).read(f"{Q}.weight").double() + 2 * b @ a
    rows = [
        m * row / math.sqrt(float((row**2).sum()))
        for m, row in zip(tensors[f"base_model.model.{Q}.lora_magnitude_vector"].double(), total)
    ]
    assert float((both.read(f"{Q}.weight").double() - torch.stack(rows)).abs().max()) < 1e-6


def test_rows_are_merged_alike_in_pieces_of_any_size(
    tmp_path: Path, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = lowbit.with_adapter(tiny_folder("llama"), write(tmp_path / "a", llama_factors()))
    whole = both.read(f"{Q}.weight")
    monkeypatch.setattr(changes, "CHUNK", 96)
    assert torch.equal(both.read(f"{Q}.weight"), whole)


def test_a_conv1d_is_merged_as_it_lies(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    name = "transformer.h.0.attn.c_attn"
    tensors = factors({name: (96, 32)})
    both = lowbit.with_adapter(tiny_folder("gpt2"), write(tmp_path / "a", tensors, fan_in_fan_out=True))
    a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    wanted = open_source(tiny_folder("gpt2")).read(f"{name}.weight").double() + 2 * (b @ a).T
    assert torch.equal(both.read(f"{name}.weight"), wanted.float())


@pytest.mark.parametrize("recipe", ["absmax@int4:g32", "rotate+rtn@int4:g32"])
def test_one_step_is_two_steps(recipe: str, tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    adapter = write(tmp_path / "a", llama_factors())
    base = tiny_folder("llama")
    made = lowbit.merge(base, adapter, tmp_path / "float")
    assert isinstance(made, Dequantized) and made.error == 0
    lowbit.quantize(tmp_path / "float", recipe, tmp_path / "two")
    lowbit.quantize(base, recipe, tmp_path / "one", adapter=adapter)
    lowbit.merge(base, adapter, tmp_path / "by-merge", recipe)
    two = (tmp_path / "two" / "model.safetensors").read_bytes()
    assert (
        (tmp_path / "one" / "model.safetensors").read_bytes()
        == two
        == (tmp_path / "by-merge" / "model.safetensors").read_bytes()
    )
    lowbit.quantize(base, recipe, tmp_path / "plain")
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() != two


def test_a_base_in_bfloat16_is_rounded_once(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    lowbit.dequantize_model(tiny_folder("llama"), tmp_path / "bf16", dtype="bfloat16")
    tensors = llama_factors()
    lowbit.merge(tmp_path / "bf16", write(tmp_path / "a", tensors), tmp_path / "float")
    a, b = (tensors[f"base_model.model.{Q}.lora_{side}.weight"].double() for side in "AB")
    wanted = load_file(tmp_path / "bf16" / "model.safetensors")[f"{Q}.weight"].double() + 2 * b @ a
    assert torch.equal(load_file(tmp_path / "float" / "model.safetensors")[f"{Q}.weight"], wanted.bfloat16())


def test_with_text_and_a_killed_run(
    tmp_path: Path, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_writer, "_FLUSH", 1)
    adapter = write(tmp_path / "a", llama_factors())
    ids = [torch.arange(3, 67) % 128, torch.arange(9, 73) % 128]
    lowbit.merge(tiny_folder("llama"), adapter, tmp_path / "float")
    lowbit.quantize(tmp_path / "float", "gptq@int4:g32", tmp_path / "two", calibration=ids)
    seen = []

    class Killed(BaseException):
        pass

    def stop(solved: object) -> None:
        seen.append(solved)
        if len(seen) == 15:
            raise Killed

    with pytest.raises(Killed):
        lowbit.quantize(
            tiny_folder("llama"), "gptq@int4:g32", tmp_path / "one", calibration=ids, adapter=adapter, on_layer=stop
        )
    again = []
    lowbit.quantize(
        tiny_folder("llama"), "gptq@int4:g32", tmp_path / "one", calibration=ids, adapter=adapter, on_layer=again.append
    )
    assert 0 < len(again) < 21
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    other = write(tmp_path / "b", llama_factors(seed=1))
    with pytest.raises(LowbitError):  # another adapter is another model
        lowbit.quantize(tiny_folder("llama"), "gptq@int4:g32", tmp_path / "one", calibration=ids, adapter=other)


def test_a_quantized_base_is_quantized_again_as_it_was(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    base = tmp_path / "base"
    lowbit.quantize(tiny_folder("llama"), "gptq@int4:g32", base, calibration="builtin", samples=2, length=32)
    made = lowbit.merge(base, write(tmp_path / "a", llama_factors()), tmp_path / "out")
    before, after = (json.loads((folder / "lowbit.json").read_text()) for folder in (base, tmp_path / "out"))
    assert before["recipe"]["text"] == after["recipe"]["text"] and before["calibration"] == after["calibration"]
    assert str(made.plan.recipe) == "gptq@int4:g32"
    assert any(
        "the adapter a (LoRA, rank 4, trained on org/tiny) is merged into the weights" in note
        for note in after["notes"]
    )
    with torch.no_grad():
        ids = torch.tensor([[5, 9, 77, 3]])
        wanted = lowbit.with_adapter(base, tmp_path / "a").load_float()(input_ids=ids).logits
        got, old = (lowbit.load(folder)(input_ids=ids).logits for folder in (tmp_path / "out", base))
    assert torch.linalg.vector_norm(got - wanted) < 0.5 * torch.linalg.vector_norm(old - wanted)


def test_what_the_folder_says_of_its_making(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    lowbit.quantize(tiny_folder("llama"), "gptq@int4:g32", tmp_path / "ids", calibration=[torch.arange(3, 67)])
    found = as_before(tmp_path / "ids")
    assert (str(found.recipe), found.text, found.windows, found.length) == ("gptq@int4:g32", None, 1, 64)
    with pytest.raises(RecipeError, match="calibrated on token ids, which is not in its folder; give the text"):
        lowbit.merge(tmp_path / "ids", write(tmp_path / "a", llama_factors()), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lowbit.quantize(tiny_folder("llama"), "gptq@int4:g32", tmp_path / "self", calibration="self", samples=1, length=16)
    found = as_before(tmp_path / "self")
    assert (found.text, found.windows, found.length) == ("self", 1, 16)


def test_weights_that_were_rewritten_take_only_adapters_of_their_own(
    tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    base = tmp_path / "rotated"
    lowbit.quantize(tiny_folder("llama"), "rotate+rtn@int8:channel", base)
    with pytest.raises(
        SourceError,
        match="quantized with rotate, so its weights are other ones .* merge it into the float model: lowbit merge FLOAT",
    ):
        lowbit.merge(base, write(tmp_path / "a", llama_factors()), tmp_path / "out")
    own = write(tmp_path / "b", llama_factors(), base_model_name_or_path="/somewhere/rotated")
    assert lowbit.merge(base, own, tmp_path / "out").folder == tmp_path / "out"


def test_one_of_two_tied_tensors_is_untied(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = {
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.randn(4, 128, generator=generator),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.randn(32, 4, generator=generator),
    }
    base = open_source(tiny_folder("llama-tied"))
    weight = base.read("model.embed_tokens.weight")
    changed = (
        weight.double() + 2 * (embedding[min(embedding)].double().T @ embedding[max(embedding)].double().T)
    ).float()
    both = lowbit.with_adapter(tiny_folder("llama-tied"), write(tmp_path / "a", embedding))
    assert torch.equal(both.read("model.embed_tokens.weight"), changed) and torch.equal(
        both.read("lm_head.weight"), weight
    )
    assert not both.inventory.tied and any("stored apart" in note for note in both.merged)
    made = lowbit.quantize(both, "int8:channel", tmp_path / "out")
    assert made.model.get_output_embeddings().weight is not made.model.get_input_embeddings().weight
    head = {
        "base_model.model.lm_head.lora_A.weight": embedding[max(embedding)].T, "base_model.model.lm_head.lora_B.weight": embedding[min(embedding)].T,
    }  # fmt: skip
    same = lowbit.with_adapter(tiny_folder("llama-tied"), write(tmp_path / "b", embedding | head))
    assert same.inventory.tied and "lm_head.weight" not in same.tensors
    assert torch.equal(same.read("model.embed_tokens.weight"), changed)


def test_biases_and_replaced_tensors(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    norm, bias = torch.rand(32), torch.rand(32)
    tensors = factors({Q: (32, 32)}) | {
        "base_model.model.model.norm.weight": norm, f"base_model.model.{Q}.base_layer.bias": bias,
    }  # fmt: skip
    both = lowbit.with_adapter(
        tiny_folder("qwen2"), write(tmp_path / "a", tensors, bias="lora_only", modules_to_save=["norm"])
    )
    assert torch.equal(both.read("model.norm.weight"), norm) and torch.equal(both.read(f"{Q}.bias"), bias)
    tensors = factors({Q: (32, 32)}) | {f"base_model.model.{Q}.lora_B.bias": bias}
    both = lowbit.with_adapter(tiny_folder("qwen2"), write(tmp_path / "b", tensors, lora_bias=True))
    wanted = open_source(tiny_folder("qwen2")).read(f"{Q}.bias").double() + 2 * bias.double()
    assert torch.equal(both.read(f"{Q}.bias"), wanted.float())


def test_outputs_that_would_replace_what_is_read(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    adapter = write(tmp_path / "a", llama_factors())
    for out in (tiny_folder("llama"), adapter, adapter / "in", tiny_folder("llama") / "in"):
        with pytest.raises(OutputError):
            lowbit.merge(tiny_folder("llama"), adapter, out, "int8:channel")
        with pytest.raises(OutputError):
            lowbit.merge(tiny_folder("llama"), adapter, out)


def test_options_that_would_be_ignored(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    adapter, base = write(tmp_path / "a", llama_factors()), tiny_folder("llama")
    with pytest.raises(RecipeError, match="samples would be ignored"):
        lowbit.merge(base, adapter, tmp_path / "out", samples=3)
    with pytest.raises(RecipeError, match="exclude each other"):
        lowbit.merge(base, adapter, tmp_path / "out", "w4", dtype="float32")
    with pytest.raises(SourceError, match="open already"):
        lowbit.quantize(lowbit.with_adapter(base, adapter), "int8:channel", tokenizer=object())
    assert not (tmp_path / "out").exists()


def test_a_module_in_memory_takes_an_adapter(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    from tiny import tiny_model

    adapter = write(tmp_path / "a", llama_factors())
    made = lowbit.quantize(tiny_model("llama"), "int8:channel", adapter=adapter)
    ids = torch.tensor([[5, 9, 77, 3]])
    with torch.no_grad():
        wanted = lowbit.with_adapter(tiny_folder("llama"), adapter).load_float()(input_ids=ids).logits
        got = made.model(input_ids=ids).logits
    assert torch.linalg.vector_norm(got - wanted) < 0.02 * torch.linalg.vector_norm(wanted)
