"""Fields of config.json, of quantization_config and of GGUF metadata: what is refused, by name, and that nothing else is."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit
from lowbit.cli import guard
from lowbit.engine.expected_shapes import expected
from lowbit.engine.shape import shape_of
from lowbit.errors import LowbitError, SourceError
from lowbit.families import families
from lowbit.interchange.checks.config import check_config, check_decoder, lacks
from lowbit.interchange.checks.fields import ACTIVATIONS
from lowbit.interchange.checks.foreign import check_foreign
from lowbit.interchange.checks.gguf import check_gguf
from lowbit.interchange.checks.section import check_parts, read_section
from lowbit.interchange.checks.tensors import check_layers, layers_of
from lowbit.interchange.checks.words import check_generation, check_tokenizer
from lowbit.interchange.hf.bounds import no_more_than
from lowbit.interchange.hf.models import meta_model
from tiny import TINY, save_tiny

DECODERS = {name for name, family in families().items() if family.decoder}
NAN, INF = float("nan"), float("inf")


def default(kind: str, **values: Any) -> dict[str, Any]:
    config = transformers.AutoConfig.for_model(kind, **values)
    return json.loads(json.dumps(config.to_dict(), default=str))


def kinds() -> list[str]:
    from transformers import CONFIG_MAPPING

    return list(CONFIG_MAPPING.keys())


def refused_defaults(chosen: list[str]) -> tuple[int, list[str]]:
    seen, refused = 0, []
    for kind in chosen:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                config = default(kind)
            except Exception:  # a few need arguments
                continue
        seen += 1
        try:
            check_config(config, kind)
        except SourceError as error:
            refused.append(str(error))
    return seen, refused


def test_default_configs_of_some_families_pass() -> None:
    seen, refused = refused_defaults(["lxmert", "gemma3n_text", "gpt_neo", "nemotron", "cvt", "musicflamingo", "gpt_oss", "qwen2_moe", "bert", "t5", *sorted(DECODERS)])  # fmt: skip
    assert seen >= 18 and not refused


@pytest.mark.slow
def test_default_configs_of_all_families_pass() -> None:
    seen, refused = refused_defaults(kinds())
    assert seen > 400 and not refused, "\n".join(refused)


def test_the_table_knows_what_others_know() -> None:
    from transformers.activations import ACT2FN

    assert set(ACT2FN) <= set(ACTIVATIONS)


SMALL = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


def rope(**fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **fields}}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 32,
}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 0}, "num_hidden_layers"), ({"num_hidden_layers": False}, "num_hidden_layers"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers"), ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers"), ({"num_hidden_layers": [2]}, "num_hidden_layers"),
    ({"hidden_size": 0}, "hidden_size"), ({"hidden_size": -64}, "hidden_size"), ({"hidden_size": 2**70}, "hidden_size"),
    ({"num_attention_heads": 0}, "num_attention_heads"), ({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None}, "num_attention_heads"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"), ({"num_key_value_heads": 0}, "num_key_value_heads"),
    ({"head_dim": -16}, "head_dim"), ({"vocab_size": True}, "vocab_size"), ({"vocab_size": 0}, "vocab_size"),
    ({"rms_norm_eps": NAN}, "rms_norm_eps"), ({"rms_norm_eps": 0}, "rms_norm_eps"), ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ({"rms_norm_eps": INF}, "rms_norm_eps"), ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    ({"layer_types": ["full_attention"]}, "layer_types"), ({"layer_types": "full_attention"}, "layer_types"), ({"layer_types": [1, 2]}, "layer_types"),
    ({"no_rope_layers": [1]}, "no_rope_layers"), ({"no_rope_layers": [1, 7]}, "no_rope_layers"),
    ({"eos_token_id": "2"}, "eos_token_id"), ({"eos_token_id": [2, None]}, "eos_token_id"), ({"pad_token_id": 64}, "pad_token_id"), ({"bos_token_id": 1.5}, "bos_token_id"),
    ({"hidden_act": "nothing"}, "hidden_act"), ({"hidden_act": 5}, "hidden_act"), ({"sliding_window": -1}, "sliding_window"),
    ({"max_position_embeddings": 0}, "max_position_embeddings"), ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"attention_dropout": 2.0}, "attention_dropout"), ({"dtype": "float99"}, "dtype"), ({"architectures": "LlamaForCausalLM"}, "architectures"),
    ({"architectures": [5]}, "architectures"), ({"model_type": {}}, "model_type"), ({"text_config": []}, "text_config"), ({"quantization_config": 5}, "quantization_config"),
    ({"text_config": {"model_type": "llama", **SMALL, "num_key_value_heads": 3}}, "text_config.num_key_value_heads"),
    ({"vision_config": {"hidden_size": "x"}}, "vision_config.hidden_size"), ({"vision_config": {"num_hidden_layers": 10**9}}, "vision_config.num_hidden_layers"),
    ({"attn_implementation": "org/kernel"}, "attn_implementation"), ({"num_labels": 10**9}, "num_labels"), ({"anything": [1, {"x": NAN}]}, "anything.1.x"), ({"anything": 10**30}, "anything"),
    (rope(rope_theta=0), "rope_theta"), (rope(rope_theta=-1.0), "rope_theta"), (rope(rope_theta=NAN), "rope_theta"), (rope(rope_theta="1e4"), "rope_theta"), (rope(rope_theta=INF), "rope_theta"),
    (rope(partial_rotary_factor=1000.0), "partial_rotary_factor"), (rope(partial_rotary_factor=0), "partial_rotary_factor"), (rope(partial_rotary_factor=-0.5), "partial_rotary_factor"),
    (rope(rope_type="nothing"), "rope_type"), (rope(rope_type=5), "rope_type"), (rope(rope_type="linear"), "factor"), (rope(rope_type="linear", factor=0), "factor"), (rope(rope_type="dynamic", factor=NAN), "factor"),
    *((rope(**{**LLAMA3, name: None}), name) for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
    *((rope(**{**LLAMA3, name: -1.0}), name) for name in ("factor", "low_freq_factor", "original_max_position_embeddings")),
    (rope(**{**LLAMA3, "high_freq_factor": 1.0}), "high_freq_factor"), (rope(rope_type="yarn"), "factor"), (rope(rope_type="yarn", factor=4.0, beta_fast=0), "beta_fast"), (rope(rope_type="yarn", factor=4.0, attention_factor="x"), "attention_factor"),
    *((rope(**{**LONG, "short_factor": value}), "short_factor") for value in (None, [], [1.0] * 7 + [0], ["a"] * 8, [NAN] * 8, 1.0, {"0": 1.0})),
    (rope(**{**LONG, "long_factor": [1.0] * 7}), "long_factor"), (rope(**{**LONG, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}), "short_factor"), (rope(**{**LONG, "original_max_position_embeddings": 1}), "original_max_position_embeddings"),
    ({"rope_parameters": []}, "rope_parameters"), ({"rope_scaling": {"type": "linear"}}, "factor"), (rope(rope_type="llama3", factor={}), "factor"), ({"rope_theta": 0}, "rope_theta"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "name"), WRONG, ids=lambda v: str(v)[:60])
def test_a_wrong_field_is_named(fields: dict[str, Any], name: str) -> None:
    config = {**default("llama", **SMALL), "head_dim": 16, **fields}
    with pytest.raises(SourceError) as caught:
        check_config(config, "m/config.json")
    text = str(caught.value)
    assert name in text and text.startswith("m/config.json") and "\n" not in text and len(text) < 700


@pytest.mark.parametrize("fields", [{}, rope(**LLAMA3), rope(**LONG), rope(partial_rotary_factor=0.5), {"rope_scaling": None, "sliding_window": 0}, {"eos_token_id": [1, 2]}, {"layer_types": None}, {"pad_token_id": -1}, {"num_key_value_heads": None}, {"rope_scaling": {"type": "linear", "factor": 2}}, {"unheard_of": {"a": [1, None, "x", INF]}}])  # fmt: skip
def test_what_a_model_may_have_passes(fields: dict[str, Any]) -> None:
    check_config({**default("llama", **SMALL), "head_dim": 16, **fields}, "here")


def test_layers_with_other_positions_each_have_theirs() -> None:
    kinds = ["full_attention", "sliding_attention"]
    config = default("gemma3_text", **SMALL, head_dim=16, layer_types=kinds)
    check_config(config, "here")
    del config["rope_parameters"]["sliding_attention"]
    with pytest.raises(SourceError, match="nothing for sliding_attention"):
        check_config(config, "here")


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_a_config_that_transformers_wrote_lacks_nothing(kind: str, tmp_path: Path) -> None:
    transformers.AutoConfig.for_model(kind, **SMALL, pad_token_id=0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not lacks(config)
    for name in ("hidden_size", "num_key_value_heads", "rope_parameters", "rms_norm_eps"):
        assert lacks({k: v for k, v in config.items() if k != name})
    with pytest.raises(SourceError, match="hidden_size is missing"):
        check_decoder({k: v for k, v in config.items() if k != "hidden_size"}, "here")


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_shapes_are_those_of_the_model(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind, **SMALL, head_dim=16, pad_token_id=0)
    wanted = expected(shape_of(config.to_dict()))
    found = {name: tuple(p.shape) for name, p in meta_model(config).state_dict().items()}
    assert set(found) <= set(wanted) and all(wanted[name] == shape for name, shape in found.items())


def test_layers_are_counted_by_names() -> None:
    names = ["model.layers.0.a.weight", "model.layers.11.b", "layers.3", "h.99999999999999999999.x"]
    assert layers_of(names[:3]) == 12 and layers_of([]) == 0 and layers_of(["x.0.y"]) == 0
    check_layers({"model_type": "llama", "num_hidden_layers": 12}, names[:3], "here")
    with pytest.raises(SourceError, match="num_hidden_layers is 13, and the weights have 12"):
        check_layers({"model_type": "llama", "num_hidden_layers": 13}, names[:3], "here")
    with pytest.raises(SourceError, match="text_config.num_hidden_layers is 9000"):
        check_layers({"text_config": {"num_hidden_layers": 9000}}, names[:3], "here")
    check_layers({"model_type": "albert", "num_hidden_layers": 24}, ["encoder.layer.0.x.weight"], "here")


def test_building_ends_where_the_weights_cannot_fill_it() -> None:
    before = torch.nn.modules.module._global_module_registration_hooks.copy()
    with pytest.raises(ValueError, match="more than"), no_more_than(3):
        nn.ModuleList(nn.Linear(1, 1, device="meta") for _ in range(10**7))
    with no_more_than(3), no_more_than(None):
        nn.ModuleList(nn.Linear(1, 1, device="meta") for _ in range(100))
    assert torch.nn.modules.module._global_module_registration_hooks == before
    config = TINY["mixtral"]()
    config.num_hidden_layers = 2000
    with pytest.raises(SourceError, match="weights have 7 tensors"):
        meta_model(config, 7)


# ---------------------------------------------------------------- the section of our own folders


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checks")
    save_tiny("llama-tied", root / "float")
    lowbit.quantize(root / "float", "w8", root / "packed")
    return root / "packed"


NAME = "model.layers.0.self_attn.q_proj.weight"


def entry(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda section: section["tensors"][NAME].update(fields)


SECTIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "null": (lambda s: s.update(tensors=None), "tensors is missing"), "none": (lambda s: s.pop("tensors"), "tensors is missing"),
    "list": (lambda s: s.update(tensors=[]), "tensors is a list"), "text entry": (lambda s: s["tensors"].update({NAME: "x"}), "tensors is an object"),
    "list entry": (lambda s: s["tensors"].update({NAME: []}), "tensors is an object"), "inputs 5": (entry(inputs=5), "inputs is 5"), "inputs text": (entry(inputs="x:y"), "q_proj"),
    "format 5": (entry(format=5), "format is 5"), "format text": (entry(format="int4:"), "q_proj"), "other format": (entry(format="int4:g32"), "q_proj"), "no format": (lambda s: s["tensors"][NAME].pop("format"), "format is missing"),
    "shape text": (entry(shape="32"), "shape is"), "shape of texts": (entry(shape=["32", "32"]), "shape is"), "shape of floats": (entry(shape=[32.0, 32.0]), "shape is"), "negative": (entry(shape=[-32, 32]), "shape is"),
    "one dimension": (entry(shape=[1024]), "shape is"), "other shape": (entry(shape=[32, 16]), "q_proj"), "huge": (entry(shape=[2**31, 2**31]), "shape is"), "flag": (entry(transposed="no"), "transposed is"),
    "tied list": (lambda s: s.update(tied=[]), "tied is"), "tied number": (lambda s: s.update(tied={"lm_head.weight": 5}), "tied is"), "tied to nothing": (lambda s: s.update(tied={"lm_head.weight": "nothing"}), "does not have"),
    "tied in a ring": (lambda s: s.update(tied={"a": "b", "b": "a"}), "another one's"), "recipe": (lambda s: s.update(recipe=5), "recipe is 5"), "unknown": (lambda s: s.update(more=1), "'more'"),
    "version": (lambda s: s.update(version={}), "version is"), "forgotten": (lambda s: s["tensors"].pop(NAME), "q_proj"), "too many": (lambda s: s["tensors"].update({"x.weight": {"format": "int8:g128", "shape": [8, 128]}}), "x.weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", SECTIONS)
def test_a_wrong_section_is_refused_by_whatever_reads_it(what: str, packed: Path, tmp_path: Path) -> None:
    from lowbit.interchange.hf.packed_model import load_packed
    from lowbit.interchange.readers.folder import FolderSource
    from lowbit.interchange.readers.lowbit_folder import LowbitFolder

    change, words = SECTIONS[what]
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((packed / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    for reader in (FolderSource, LowbitFolder, load_packed):
        with pytest.raises(SourceError) as caught:
            reader(tmp_path)
        text = str(caught.value).replace(str(tmp_path), "")
        assert words in text and "\n" not in text, (reader.__name__, text)


def test_the_section_and_the_parts_of_a_whole_folder_pass(packed: Path) -> None:
    section = read_section(json.loads((packed / "config.json").read_text())["quantization_config"], "here")
    stored = {name: (t.dtype, tuple(t.shape)) for name, t in load_file(packed / "model.safetensors").items()}
    check_parts(section, stored, "here")
    assert section.tensors[NAME].module_shape == (32, 32) and section.tied == {
        "lm_head.weight": "model.embed_tokens.weight"
    }
    part = f"{NAME}.codes"
    for wrong in (
        {part: (torch.float32, stored[part][1])},
        {part: (torch.uint8, (1, 1))},
        {f"{NAME}.more": stored[part]},
    ):
        with pytest.raises(SourceError, match="q_proj"):
            check_parts(section, {**stored, **wrong}, "here")
    with pytest.raises(SourceError, match=f"lacks tensor '{part}'"):
        check_parts(section, {k: v for k, v in stored.items() if k != part}, "here")


def test_transformers_alone_is_told_too(packed: Path, tmp_path: Path) -> None:
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["tensors"][NAME]["shape"] = [64, 32]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"\[64, 32\].*\[32, 32\]"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


# ---------------------------------------------------------------- those of others


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ({"quant_method": "gptq", "bits": "4"}, "bits"), ({"quant_method": "gptq", "bits": 4, "group_size": [16]}, "group_size"), ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": 5}}, "dynamic"),
        ({"quant_method": "awq", "bits": None}, "bits"), ({"quant_method": "awq", "zero_point": "yes"}, "zero_point"), ({"quant_method": "fp8", "weight_block_size": [0, 16]}, "weight_block_size"),
        ({"quant_method": "bitsandbytes", "llm_int8_threshold": NAN}, "llm_int8_threshold"), ({"quant_method": 5}, "quant_method"), ({"quant_method": "compressed-tensors", "config_groups": []}, "config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": 5}}}, "config_groups.g.targets"), ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": "4"}}}}, "g.weights.num_bits"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"input_activations": []}}}, "g.input_activations"), ({"quant_method": "mxfp4", "modules_to_not_convert": 5}, "modules_to_not_convert"),
    ],
)  # fmt: skip
def test_a_wrong_section_of_another_program_is_named(section: dict[str, Any], name: str) -> None:
    with pytest.raises(SourceError, match=name.replace(".", r"\.")):
        check_foreign(section, "here")


def test_metadata_of_gguf() -> None:
    names = ["blk.0.attn_q.weight", "blk.1.attn_q.weight", "token_embd.weight"]
    good = {"llama.block_count": 2, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.rope.freq_base": 1e4, "llama.feed_forward_length": (8, 8),
            "tokenizer.ggml.tokens": None, "tokenizer.ggml.bos_token_id": 1, "general.name": "x"}  # fmt: skip
    check_gguf("llama", good, names, "here")
    wrong: list[tuple[str, Any]] = [
        ("llama.block_count", 0), ("llama.block_count", 3), ("llama.block_count", 2 * 10**9), ("llama.block_count", None), ("llama.block_count", "2"), ("llama.attention.head_count_kv", 3),
        ("llama.rope.freq_base", NAN), ("llama.rope.freq_base", 0.0), ("llama.attention.layer_norm_rms_epsilon", 0.0), ("llama.vocab_size", 0), ("llama.rope.scaling.factor", -1.0), ("tokenizer.ggml.tokens", 5),
        ("llama.feed_forward_length", (8,)), ("llama.feed_forward_length", (8, -8)), ("tokenizer.ggml.bos_token_id", -1), ("tokenizer.ggml.model", 5), ("llama.expert_count", 10**6),
    ]  # fmt: skip
    for key, value in wrong:
        with pytest.raises(SourceError, match=key.rpartition(".")[2]):
            check_gguf("llama", {**good, key: value}, names, "here")


def test_words_beside_a_tokenizer() -> None:
    check_tokenizer({"bos_token": {"content": "<s>"}, "pad_token": None, "model_max_length": int(1e30), "chat_template": [{"name": "default", "template": "x"}]}, "here")  # fmt: skip
    for wrong in (
        {"bos_token": 5},
        {"eos_token": {"text": "x"}},
        {"model_max_length": "x"},
    ):
        with pytest.raises(SourceError, match=next(iter(wrong))):
            check_tokenizer(wrong, "here")
    check_generation({"eos_token_id": [1, 2], "temperature": 0.6}, "here")
    for wrong in ({"eos_token_id": "x"}, {"eos_token_id": [[1]]}, {"pad_token_id": {}}, {"temperature": NAN}):
        with pytest.raises(SourceError, match=next(iter(wrong))):
            check_generation(wrong, "here")


# ---------------------------------------------------------------- tensors and config beside one another


def test_a_tensor_of_another_shape_is_named_with_its_field(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**whole, "vocab_size": 130}))
    with pytest.raises(LowbitError, match=r"vocab_size is 130"):
        lowbit.plan(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(whole))
    tensors = load_file(tmp_path / "model.safetensors")
    flat = copy.copy(tensors)
    flat[NAME] = flat[NAME].reshape(-1).clone()
    save_file(flat, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LowbitError, match="q_proj"):
        lowbit.plan(tmp_path)


def test_a_long_name_of_a_method_is_not_said_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny("llama", tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "x" * 5000}})
    )
    with pytest.raises(SourceError, match="quant_method is 'xxx") as caught:
        lowbit.plan(tmp_path / "m", "w8")
    assert len(str(caught.value)) < 500
    with pytest.raises(typer.Exit):
        guard.fail("y" * 5000)
    assert len(capsys.readouterr().err) < 2000


@pytest.mark.parametrize("wrong", [{"text_config": {"rope_type": "default"}}, {"dtype": {"a": "float32"}}])
def test_objects_where_a_class_has_none(wrong: dict[str, Any], tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **wrong}))
    with pytest.raises(SourceError, match="text model|dtype"):
        lowbit.plan(tmp_path / "m", "w8")
