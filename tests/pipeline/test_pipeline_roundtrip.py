"""Quantize, save, `from_pretrained`: the same weights come back in every architecture and run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lowbit
from lowbit.interchange.inventory import inventory_of
from lowbit.kernels.dispatch import Dispatcher
from lowbit.nn.packed import PackedWeight
from lowbit.nn.swap import dequantize_, packed_weights
from lowbit.recipes.recipe import Recipe
from tiny import TINY, VOCAB, tiny_model

Folder = Callable[[str, str], Path]
PLANES = 2e-4  # the packed kernel has 15 bits for float activations
RECIPES = ("search@int4:g32", "w8")
CAUSAL = [name for name in TINY if name not in ("t5", "bert")]
AUTO = {"t5": transformers.AutoModelForSeq2SeqLM, "bert": transformers.AutoModelForMaskedLM}


def auto(name: str) -> Any:
    return AUTO.get(name, transformers.AutoModelForCausalLM)


def load(name: str, folder: Path, **options: Any) -> Any:
    return auto(name).from_pretrained(folder, **{"dtype": torch.float32} | options).eval()


def logits(model: nn.Module, rows: int = 2, length: int = 9) -> Tensor:
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :5]
    with torch.no_grad():
        return model(**inputs).logits.float()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def oracle(weight: Tensor, recipe: Recipe, name: str, kind: str, transposed: bool) -> Tensor:
    """What a weight becomes, computed straight from the solver, as its module holds it."""
    fmt = recipe.format_for(name, kind)
    x = weight.transpose(-1, -2).contiguous() if transposed else weight
    dense = recipe.solver_for(fmt)(x, fmt, recipe.fit_for(fmt), None).dequantize()
    return dense.transpose(-1, -2) if transposed else dense


def parts_of(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {name: weight.qtensor().parts() for name, weight in packed_weights(model)}


def expanding(model: nn.Module) -> None:
    """Its weights are multiplied as what they stand for, in the type of the activations."""
    for _, weight in packed_weights(model):
        weight.dispatcher = Dispatcher("expand")


def assert_same_parts(model: nn.Module, other: nn.Module) -> None:
    mine, theirs = parts_of(model), parts_of(other)
    assert mine and mine.keys() == theirs.keys()
    for name, parts in mine.items():
        assert parts.keys() == theirs[name].keys()
        for part, tensor in parts.items():
            assert tensor.dtype == theirs[name][part].dtype, (name, part)
            assert torch.equal(tensor, theirs[name][part]), (name, part)


def pairs(model: nn.Module, other: nn.Module) -> Iterator[Any]:
    return zip(packed_weights(model), packed_weights(other), strict=True)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", TINY)
def test_every_architecture_comes_back_as_it_was_quantized(name: str, recipe: str, packed_folder: Folder) -> None:
    source, wanted = tiny_model(name), Recipe.of(recipe)
    model, info = auto(name).from_pretrained(packed_folder(name, recipe), dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is type(source) and not model.training

    inventory = inventory_of(source)
    packed = dict(packed_weights(model))
    assert set(packed) == {p.name for p in inventory.params.values() if p.keep is None and p.kind != "other"}
    for key, weight in packed.items():
        param = inventory.params[key]
        dense = oracle(source.get_parameter(key).detach(), wanted, key, param.kind, param.transposed)
        assert weight.shape == dense.shape and weight.dtype == torch.float32
        assert torch.equal(weight.dequantize(), dense), key

    state = model.state_dict()
    for key in inventory.params.keys() - packed.keys():
        assert torch.equal(state[key], source.state_dict()[key]), key
    for alias, key in inventory.tied.items():
        if key in packed:
            assert model.get_submodule(alias) is packed[key]
        else:
            assert model.get_parameter(alias) is model.get_parameter(key)
    assert {k for k in state if not k.startswith(tuple(packed))} >= inventory.params.keys() - packed.keys()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", TINY)
def test_packed_logits_are_those_of_the_dequantized_weights(name: str, recipe: str, packed_folder: Folder) -> None:
    model, dense = load(name, packed_folder(name, recipe)), tiny_model(name)
    with torch.no_grad():
        for key, weight in packed_weights(model):
            dense.get_parameter(key).copy_(weight.dequantize())
    assert distance(logits(model), logits(dense)) < PLANES
    expanding(model)
    assert distance(logits(model), logits(dense)) < 1e-5
    assert distance(logits(model), logits(tiny_model(name))) > 1e-4  # it is not the float model that runs


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_changes_what_computes_and_not_what_is_stored(name: str, packed_folder: Folder) -> None:
    full = load(name, packed_folder(name, RECIPES[0]))
    half = load(name, packed_folder(name, RECIPES[0]), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert_same_parts(half, full)
    for (key, a), (_, b) in pairs(half, full):
        assert a.dtype == a.dequantize().dtype == torch.bfloat16
        assert torch.equal(a.qtensor().dequantize(), b.qtensor().dequantize()), key
    dense = tiny_model(name)
    state = {k: v for k, v in half.state_dict().items() if k in dense.state_dict()}
    dense.load_state_dict(state, strict=False)
    with torch.no_grad():
        for key, weight in packed_weights(half):
            dense.get_parameter(key).copy_(weight.dequantize())
    # Against the same values computed in bfloat16 throughout: only the order of sums may differ.
    dense = dense.to(torch.bfloat16)
    truth = logits(dense.float())
    assert distance(logits(half), truth) < max(0.03, 2 * distance(logits(dense.to(torch.bfloat16)), truth))


@pytest.mark.parametrize("name", TINY)
def test_casting_a_loaded_model_keeps_the_parts(name: str, packed_folder: Folder) -> None:
    model = load(name, packed_folder(name, RECIPES[1]))
    before = copy.deepcopy(model)
    assert_same_parts(before, model)
    assert torch.equal(logits(before), logits(model))
    truth = logits(model)
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert_same_parts(model, before)
    assert all(weight.dtype == weight.dequantize().dtype == torch.bfloat16 for _, weight in packed_weights(model))
    assert distance(logits(model), truth) < 0.1
    model.to(torch.float32)
    assert_same_parts(model, before)
    assert all(torch.equal(a.dequantize(), b.dequantize()) for (_, a), (_, b) in pairs(model, before))


@pytest.mark.parametrize("name", TINY)
def test_state_dict_goes_round(name: str, packed_folder: Folder) -> None:
    model = load(name, packed_folder(name, RECIPES[0]))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert_same_parts(other, model)
    # Buffers outside the state (rotary frequencies) were zeroed too: put them back before running.
    for (key, mine), theirs in zip(other.named_buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)
        assert torch.equal(mine, theirs), key
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("name", TINY)
def test_saved_by_transformers_it_loads_again(name: str, packed_folder: Folder, tmp_path: Path) -> None:
    model = load(name, packed_folder(name, RECIPES[0]))
    model.save_pretrained(tmp_path / "again")
    again, info = auto(name).from_pretrained(tmp_path / "again", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_parts(again, model)
    for key, tensor in model.named_parameters():
        assert torch.equal(again.get_parameter(key), tensor)
    assert torch.equal(logits(again.eval()), logits(model))


@pytest.mark.parametrize("name", TINY)
def test_asking_for_embeddings_and_tying_again_do_no_harm(name: str, packed_folder: Folder) -> None:
    model = load(name, packed_folder(name, RECIPES[0]))
    before, same = logits(model), {id(m) for m in model.modules()}
    model.tie_weights()
    assert {id(m) for m in model.modules()} == same and torch.equal(logits(model), before)
    assert isinstance(model.get_input_embeddings().weight, PackedWeight)
    assert tuple(model.get_input_embeddings().weight.shape) == (VOCAB, 32)
    output = model.get_output_embeddings()
    if model.config.tie_word_embeddings and output is not None:
        assert output.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", [n for n in TINY if n != "bert"])
def test_generate_says_what_the_dense_model_says(name: str, packed_folder: Folder) -> None:
    model = load(name, packed_folder(name, RECIPES[0]))
    dense = dequantize_(copy.deepcopy(model))
    ids = torch.tensor([[5, 9, 17, 33], [8, 64, 2, 90]])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), dense.generate(ids, **options))


@pytest.mark.parametrize("where", ["auto", "cpu", {"": "cpu"}])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "t5"])
def test_device_map(name: str, where: Any, packed_folder: Folder) -> None:
    pytest.importorskip("accelerate")
    plain = load(name, packed_folder(name, RECIPES[0]))
    mapped = load(name, packed_folder(name, RECIPES[0]), device_map=where)
    assert_same_parts(mapped, plain)
    assert torch.equal(logits(mapped), logits(plain))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "qwen3-moe", "t5"])
def test_shards(name: str, packed_folder: Folder, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    lowbit.quantize(tiny_folder(name), RECIPES[0], tmp_path / "out", max_shard_bytes=5000)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(files) > 3 and (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert_same_parts(load(name, tmp_path / "out"), load(name, packed_folder(name, RECIPES[0])))


def test_tied_weights_are_in_memory_once(packed_folder: Folder) -> None:
    tied = load("t5", packed_folder("t5", RECIPES[0]))
    table = tied.shared.weight
    assert tied.encoder.embed_tokens.weight is tied.decoder.embed_tokens.weight is tied.lm_head.weight is table
    assert sum(name.endswith("codes") for name, _ in tied.named_buffers()) == len(parts_of(tied))
    names = [name for name, tensor in tied.state_dict(keep_vars=True).items() if tensor is table.get_buffer("codes")]
    assert len(names) == 4


def test_a_pipeline_of_transformers_runs(packed_folder: Folder) -> None:
    folder = packed_folder("llama-tied", RECIPES[0])
    write = transformers.pipeline("text-generation", model=str(folder), dtype=torch.float32)
    text = write("the and in", max_new_tokens=5, min_new_tokens=5, do_sample=False)[0]["generated_text"]
    model, tokenizer = load("llama-tied", folder), transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the and in", return_tensors="pt")
    ids.pop("token_type_ids", None)
    expected = model.generate(**ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert text.endswith(tokenizer.decode(expected[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def test_dequantize_gives_an_ordinary_model(packed_folder: Folder, tmp_path: Path) -> None:
    model = load("llama-tied", packed_folder("llama-tied", RECIPES[0]))
    before, weight = logits(model), model.lm_head.weight.dequantize()
    dense = model.dequantize()
    assert not list(packed_weights(dense)) and torch.equal(dense.lm_head.weight, weight)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    assert distance(logits(dense), before) < PLANES
    expanding(model)
    assert distance(logits(dense), logits(model)) < 1e-5
    dense.save_pretrained(tmp_path / "dense")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert torch.equal(logits(plain.eval()), logits(dense))


def test_in_memory_an_alias_may_be_listed_before_its_owner() -> None:
    """XLM-RoBERTa registers its head, whose weight is the table's, before the encoder that owns the table."""
    config = transformers.XLMRobertaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.XLMRobertaForMaskedLM(config).eval()
    made = lowbit.quantize(model, "w8").model
    assert isinstance(made.lm_head.decoder.weight, PackedWeight)
    assert made.lm_head.decoder.weight is made.roberta.embeddings.word_embeddings.weight
    assert made.lm_head.decoder.bias is made.lm_head.bias
    assert distance(logits(made), logits(model)) < 0.05
