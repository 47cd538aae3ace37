"""Facts fit their models exactly, wrong ones are caught, and what is unknown is refused with the reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from variants import FAMILIES, family_source, random_source

from lowbit.errors import TransformError
from lowbit.families import families
from lowbit.families.family import Between, Graph
from lowbit.interchange.opening import open_source
from lowbit.transforms import layouts
from lowbit.transforms.arch import Link, arch_of, shared_channels
from lowbit.transforms.check import check_family, check_function, tiny_config
from lowbit.transforms.fold import fold
from lowbit.transforms.rotate import rotate
from tiny import TINY


@pytest.mark.parametrize("name", ["falcon", "bert", "mamba", "bloom"])
def test_an_unknown_architecture_is_refused_and_told_what_works(name: str) -> None:
    source = random_source(TINY[name]())
    with pytest.raises(TransformError, match=rf"no facts about models of type '{name}'.*llama.*gptq"):
        fold(source)


def test_a_module_without_a_config_is_refused() -> None:
    with pytest.raises(TransformError, match="a module without a config"):
        fold(open_source(torch.nn.Sequential(torch.nn.Linear(16, 16))))


def test_a_tensor_without_a_place_in_the_facts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families(), "qwen3", families()["llama"])
    with pytest.raises(TransformError, match=r"self_attn\.[qk]_norm\.weight' \(4 such tensors\) has no place"):
        fold(family_source("qwen3"))
    monkeypatch.setitem(families(), "gpt2", families()["llama"])
    with pytest.raises(TransformError, match=r"do not fit: there is no 'model\.layers"):
        fold(family_source("gpt2"))


def test_norms_on_the_stream_are_refused() -> None:
    config = FAMILIES["opt"]()
    config.do_layer_norm_before = False
    with pytest.raises(TransformError, match="do_layer_norm_before=False"):
        fold(random_source(config))


POST_NORMS = tuple(f"model.layers.{{i}}.post_{part}_layernorm" for part in ("attention", "feedforward"))


def changed(name: str, **facts: Any) -> Graph:
    graph = families()[name].channels
    assert graph is not None
    return dataclasses.replace(graph, **facts)


WRONG = {
    "a norm that multiplies by its weight": ("gemma", {"plus_one": False}, "fold"),
    "a norm that multiplies by one more": ("llama", {"plus_one": True}, "fold"),
    "LayerNorm taken for RMSNorm": ("phi", {"norm": "rms"}, "rotate"),
    "values in the wrong rows": (
        "gpt-neox",
        {
            "graph": changed(
                "gpt_neox",
                between=(
                    Between(
                        "gpt_neox.layers.{i}.attention.query_key_value",
                        "gpt_neox.layers.{i}.attention.dense",
                        "stacked",
                    ),
                ),
            )
        },
        "rotate",
    ),
    "post norms that are not there": (
        "gemma2",
        {"graph": changed("gemma2", post_norms=(), inside=POST_NORMS)},
        "rotate",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_fact_changes_the_logits(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change, transform = WRONG[what]
    source = family_source(name)
    model_type = str(source.config.model_type)  # type: ignore[union-attr]
    monkeypatch.setitem(families(), model_type, dataclasses.replace(families()[model_type], **change))
    with pytest.raises(TransformError, match=f"changes the function of .*{model_type}"):
        check_function(source, {"fold": fold, "rotate": rotate}[transform](source))


def naive_rows(name: str, heads: int, kv: int, d: int) -> list[int]:
    """For each channel of the output projection's input, the row of its value, by loops over the heads."""
    first = {"values": 0, "stacked": (heads + kv) * d, "interleaved": 2 * d}[name]
    step = 3 * d if name == "interleaved" else d
    out = []
    for query_head in range(heads):
        value_head = query_head // (heads // kv)
        out += [first + value_head * step + j for j in range(d)]
    return out


@pytest.mark.parametrize("name", ["values", "stacked", "interleaved"])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_rows_of_values_against_loops(name: str, kv: int) -> None:
    heads, d = 4, 8
    if name == "interleaved" and kv != heads:
        pytest.skip("heads of GPT-NeoX share nothing")
    rows = {"values": kv * d, "stacked": (heads + 2 * kv) * d, "interleaved": 3 * heads * d}[name]
    assert layouts.LAYOUTS[name](rows, heads * d, heads).tolist() == naive_rows(name, heads, kv, d)


def test_sizes_that_cannot_be_are_an_error() -> None:
    for name, sizes in {
        "values": (24, 32, 4),
        "same": (32, 64, 4),
        "interleaved": (95, 32, 4),
        "second-half": (32, 32, 4),
    }.items():
        with pytest.raises(TransformError, match="rows cannot make"):
            layouts.LAYOUTS[name](*sizes)


def test_relu_decides_whether_a_scale_passes() -> None:
    def second(name: str) -> set[str]:
        return {link.layout for link in arch_of(family_source(name)).links}

    assert second("opt") == {"values", "same"} and second("opt-gelu") == {"values"}
    assert second("gpt2-relu") == {"stacked", "same"} and second("gpt2") == {"stacked"}
    assert second("t5") == {"values", "same"} and second("t5-gated") == {"values", "same"}


def test_a_point_needs_all_of_its_readers() -> None:
    arch = arch_of(family_source("phi"))
    layer = "model.layers.0."
    qkv = [f"{layer}self_attn.{x}_proj.weight" for x in "qkv"]
    assert arch.point_for(qkv) is None  # fc1 reads the same norm
    point = arch.point_for([*qkv, f"{layer}mlp.fc1.weight"])
    assert point is not None and point.producers == (f"{layer}input_layernorm.weight", f"{layer}input_layernorm.bias")
    link = arch.point_for([f"{layer}self_attn.dense.weight"])
    assert isinstance(link, Link) and link.producer == f"{layer}self_attn.v_proj.weight"
    assert shared_channels(link) is not None and shared_channels(point) is None
    assert arch.point_for([f"{layer}mlp.fc2.weight"]) is None  # GELU stands in between


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_can_be_checked_by_its_config_alone(name: str) -> None:
    config = FAMILIES[name]()
    small = tiny_config(config)
    assert small.num_hidden_layers == 2 and small.hidden_size == 32
    assert check_family(config, fold, head=1) < 1e-10
    graph = families()[config.model_type].channels
    assert graph is not None and check_family(config, rotate, r1=0 if graph.post_norms else 1) < 1e-10


def test_a_family_of_full_size_is_checked_on_a_tiny_model() -> None:
    import transformers

    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672,
        num_hidden_layers=80, attention_bias=True,
    )  # fmt: skip
    assert check_family(config, rotate) < 1e-10 and config.hidden_size == 8192


def test_facts_name_layouts_that_there_are() -> None:
    graphs = [family.channels for family in families().values()]
    assert all(link.layout in layouts.LAYOUTS for graph in graphs if graph for link in graph.between)
