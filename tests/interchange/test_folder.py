"""A local folder as a source: every architecture bit for bit, and every way a folder can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.errors import SourceError
from lowbit.interchange.files.safetensors_writer import INDEX
from lowbit.interchange.files.settings import quantized_by
from lowbit.interchange.files.weights import SINGLE
from lowbit.interchange.inventory import inventory_of, take_inventory
from lowbit.interchange.opening import open_source
from tiny import TINY, save_tiny, tiny_tokenizer


def edit(folder: Path, change: object) -> None:
    """Rewrite the folder's weights after `change(dict of tensors)`."""
    weights = load_file(folder / SINGLE)
    change(weights)  # type: ignore[operator]
    save_file({k: v.contiguous().clone() for k, v in weights.items()}, folder / SINGLE, metadata={"format": "pt"})


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("name", TINY)
def test_every_tensor_is_the_models_own_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = save_tiny(name, tmp_path, tokenizer=False)
    source = open_source(tmp_path)
    state = model.state_dict()
    assert set(source.tensors) | set(source.inventory.tied) == set(state)
    assert not set(source.tensors) & set(source.inventory.tied)
    assert list(source.tensors) == [key for key in state if key in source.tensors]
    for key, spec in source.tensors.items():
        tensor = source.read(key)
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype)
        assert torch.equal(tensor, state[key]), key
        assert source.inventory.params[key].shape == spec.shape
    for alias, canonical in source.inventory.tied.items():
        assert state[alias].data_ptr() == state[canonical].data_ptr()
    assert source.extra == () and source.dropped == ()
    assert source.inventory == take_inventory(TINY[name]()) == inventory_of(model)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "t5", "mixtral", "mamba", "bert"])
def test_load_float_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    model = save_tiny(name, tmp_path, tokenizer=False)
    loaded = open_source(tmp_path).load_float()
    ids = torch.arange(5, 25).reshape(2, 10)
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    half = open_source(tmp_path).load_float(dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and not half.training


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_shards_are_one_model(name: str, tmp_path: Path) -> None:
    model = save_tiny(name, tmp_path / "whole", tokenizer=False)
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    source = open_source(tmp_path / "parts")
    assert list(source.tensors) == list(open_source(tmp_path / "whole").tensors)
    assert all(torch.equal(source.read(key), model.state_dict()[key]) for key in source.tensors)


def test_experts_are_fused_from_one_tensor_per_expert(tmp_path: Path) -> None:
    model = save_tiny("mixtral", tmp_path, tokenizer=False)
    stored = load_file(tmp_path / SINGLE)
    old = "model.layers.0.block_sparse_moe.experts.3.w3.weight"
    assert old in stored  # what is on disk is the old layout
    fused = open_source(tmp_path).read("model.layers.0.mlp.experts.gate_up_proj")
    assert fused.shape == (4, 128, 32) and torch.equal(fused[3, 64:], stored[old])
    assert torch.equal(fused, model.state_dict()["model.layers.0.mlp.experts.gate_up_proj"])


def test_only_the_bytes_of_the_asked_tensor_are_read(tmp_path: Path) -> None:
    """With every other byte of the file destroyed, the tensor still reads right."""
    from lowbit.interchange.files.safetensors_reader import read_header

    model = save_tiny("llama", tmp_path, tokenizer=False)
    source = open_source(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    entry = read_header(tmp_path / SINGLE).entries[name]
    raw = (tmp_path / SINGLE).read_bytes()
    keep = raw[entry.offset : entry.offset + entry.nbytes]
    (tmp_path / SINGLE).write_bytes(b"\xff" * entry.offset + keep)
    assert torch.equal(source.read(name), model.state_dict()[name])


def test_unknown_tensors_are_kept_byte_for_byte(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    odd = torch.randn(3, 5).to(torch.float16)
    edit(tmp_path, lambda w: w.update({"my.own.thing": odd}))
    source = open_source(tmp_path)
    assert source.extra == ("my.own.thing",) and list(source.tensors)[-1] == "my.own.thing"
    assert torch.equal(source.read("my.own.thing"), odd)
    assert source.inventory.params["my.own.thing"].keep == "not known to the model"


def test_leftovers_that_transformers_ignores_are_dropped_by_name(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path, tokenizer=False)
    edit(tmp_path, lambda w: w.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}))
    source = open_source(tmp_path)
    assert source.extra == () and source.dropped == ("transformer.h.0.attn.bias",)
    assert "transformer.h.0.attn.bias" not in source.tensors


def test_base_model_names_without_prefix_are_found(tmp_path: Path) -> None:
    """The original gpt2 checkpoint says `h.0...` where the model says `transformer.h.0...`."""
    model = save_tiny("gpt2", tmp_path, tokenizer=False)

    def strip(weights: dict[str, torch.Tensor]) -> None:
        for key in list(weights):
            weights[key.removeprefix("transformer.")] = weights.pop(key)

    edit(tmp_path, strip)
    source = open_source(tmp_path)
    assert all(torch.equal(source.read(key), model.state_dict()[key]) for key in source.tensors)


def test_a_tied_weight_may_be_stored_under_its_other_name(tmp_path: Path) -> None:
    model = save_tiny("llama-tied", tmp_path, tokenizer=False)
    edit(tmp_path, lambda w: w.update({"lm_head.weight": w.pop("model.embed_tokens.weight")}))
    source = open_source(tmp_path)
    assert source.inventory.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert torch.equal(source.read("model.embed_tokens.weight"), model.state_dict()["lm_head.weight"])


@pytest.mark.parametrize("equal", [True, False])
def test_both_names_of_a_tied_weight_stored(equal: bool, tmp_path: Path) -> None:
    model = save_tiny("llama-tied", tmp_path, tokenizer=False)
    head = model.lm_head.weight.detach().clone()
    head[-1, -1] += 0 if equal else 1
    edit(tmp_path, lambda w: w.update({"lm_head.weight": head}))
    source = open_source(tmp_path)
    assert ("lm_head.weight" in source.tensors) is not equal
    assert ("lm_head.weight" in source.inventory.tied) is equal
    assert source.config.tie_word_embeddings is equal
    loaded = source.load_float()
    assert torch.equal(loaded.lm_head.weight, head)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is equal


def test_a_missing_parameter_is_named(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    edit(tmp_path, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*download"):
        open_source(tmp_path)


def test_a_missing_expert_is_an_error(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path, tokenizer=False)
    edit(tmp_path, lambda w: w.pop("model.layers.0.block_sparse_moe.experts.1.w3.weight"))
    with pytest.raises(SourceError, match="gate_up_proj"):
        open_source(tmp_path)


def test_weights_of_another_width_are_named(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    edit_json(tmp_path / "config.json", intermediate_size=48)
    with pytest.raises(SourceError, match=r"mlp\.down_proj.*\[32, 64\].*\[32, 48\]"):
        open_source(tmp_path)


def _shards(folder: Path) -> None:
    save_tiny("llama", folder, tokenizer=False).save_pretrained(folder, max_shard_size="20KB")
    (folder / SINGLE).unlink(missing_ok=True)


def _lost_shard(folder: Path) -> None:
    _shards(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def _index_of_absent_tensor(folder: Path) -> None:
    _shards(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["no.such.tensor"] = next(iter(index["weight_map"].values()))
    (folder / INDEX).write_text(json.dumps(index))


def _index_outside(folder: Path) -> None:
    _shards(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../secret.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def _pickle_only(folder: Path) -> None:
    save_tiny("llama", folder, tokenizer=False)
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def _without(name: str) -> object:
    def remove(folder: Path) -> None:
        save_tiny("llama", folder, tokenizer=False)
        (folder / name).unlink()

    return remove


def _config(**values: object) -> object:
    def change(folder: Path) -> None:
        save_tiny("llama", folder, tokenizer=False)
        edit_json(folder / "config.json", **values)

    return change


def _bad_json(folder: Path) -> None:
    save_tiny("llama", folder, tokenizer=False)
    (folder / "config.json").write_text('{"model_type": ')


def _adapter(folder: Path) -> None:
    _without(SINGLE)(folder)  # type: ignore[operator]
    (folder / "adapter_config.json").write_text("{}")


def _truncated(folder: Path) -> None:
    save_tiny("llama", folder, tokenizer=False)
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-5])


WRONG = {
    "a shard is lost": (_lost_shard, "shards that are not there"),
    "the index names an absent tensor": (_index_of_absent_tensor, "no.such.tensor"),
    "the index leaves the folder": (_index_outside, "secret"),
    "only a pickle": (_pickle_only, "pickle.*save_pretrained"),
    "no config": (_without("config.json"), "no config.json"),
    "no weights": (_without(SINGLE), "no weights"),
    "config cut short": (_bad_json, "config.json.*JSON"),
    "unknown model type": (_config(model_type="no-such-model", architectures=["X"]), "no-such-model"),
    "remote code": (
        _config(model_type="x", auto_map={"AutoConfig": "evil.Config"}),
        "cannot use this config",
    ),
    "quantized in an unknown way": (
        _config(quantization_config={"quant_method": "quip"}),
        "already.*quip.*cannot read",
    ),
    "said to be quantized": (
        _config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "with gptq, and no tensor is",
    ),
    "an adapter": (_adapter, "merge_and_unload"),
    "truncated": (_truncated, "truncated"),
    "a layer too many": (_config(num_hidden_layers=3), "num_hidden_layers is 3, and the weights have 2 layers"),
    "sizes that do not fit": (_config(hidden_size=-4), "config.json"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_folder_is_one_clear_error(case: str, tmp_path: Path) -> None:
    make, said = WRONG[case]
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(SourceError, match=said) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    edit_json(tmp_path / "config.json", model_type="x", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(SourceError):
        open_source(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_by_whom_a_folder_is_quantized(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    assert quantized_by(tmp_path) is None
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "lowbit"})
    assert quantized_by(tmp_path) == "lowbit"


def test_identity_changes_with_the_weights_and_not_otherwise(tmp_path: Path) -> None:
    for seed, folder in ((0, "a"), (0, "b"), (1, "c")):
        save_tiny("llama", tmp_path / folder, tokenizer=False, seed=seed)
    a, b, c = (open_source(tmp_path / folder).identity() for folder in "abc")
    assert a == b != c and json.loads(json.dumps(a)) == a
    assert a["files"][SINGLE]["header"] == c["files"][SINGLE]["header"]


def test_assets_are_the_tokenizer_and_nothing_else(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "in")
    (tmp_path / "in" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "in" / "tokenizer_extra.py").write_text("")
    (tmp_path / "out").mkdir()
    source = open_source(tmp_path / "in")
    source.save_assets(tmp_path / "out")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    } <= written
    assert not written & {"config.json", SINGLE, "tokenizer_extra.py"}
    assert source.tokenizer()("the hand").input_ids == tiny_tokenizer()("the hand").input_ids


def test_no_tokenizer_is_an_error_that_says_so(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    with pytest.raises(SourceError, match="cannot load a tokenizer.*pass tokenizer="):
        open_source(tmp_path).tokenizer()
    given = tiny_tokenizer()
    assert open_source(tmp_path, tokenizer=given).tokenizer() is given


def test_a_tensor_name_misspelt_offers_the_right_one(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    with pytest.raises(SourceError, match="did you mean 'lm_head.weight'"):
        open_source(tmp_path).read("lm_head.wieght")
