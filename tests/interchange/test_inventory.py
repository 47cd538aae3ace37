"""What each tensor is, found by walking: the kinds that matter, and why the rest is kept."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter

import pytest
import torch
from torch import nn

from lowbit.interchange.inventory import Inventory, inventory_of, take_inventory
from tiny import TINY, tiny_model

# architecture -> (number of quantizable tensors of each kind, aliases -> canonical)
EXPECTED = {
    "llama": ({"embedding": 1, "linear": 15}, {}),
    "llama-tied": ({"embedding": 1, "linear": 14}, {"lm_head.weight": "model.embed_tokens.weight"}),
    "mistral": ({"embedding": 1, "linear": 15}, {}),
    "qwen2": ({"embedding": 1, "linear": 14}, {"lm_head.weight": "model.embed_tokens.weight"}),
    "qwen3": ({"embedding": 1, "linear": 14}, {"lm_head.weight": "model.embed_tokens.weight"}),
    "gemma2": ({"embedding": 1, "linear": 14}, {"lm_head.weight": "model.embed_tokens.weight"}),
    "gemma3": ({"embedding": 1, "linear": 14}, {"lm_head.weight": "model.embed_tokens.weight"}),
    "phi": ({"embedding": 1, "linear": 13}, {}),
    "gpt2": ({"embedding": 2, "conv1d": 8}, {"lm_head.weight": "transformer.wte.weight"}),
    "gpt-neox": ({"embedding": 1, "linear": 9}, {}),
    "opt": ({"embedding": 2, "linear": 12}, {"lm_head.weight": "model.decoder.embed_tokens.weight"}),
    "bloom": ({"embedding": 1, "linear": 8}, {"lm_head.weight": "transformer.word_embeddings.weight"}),
    "falcon": ({"embedding": 1, "linear": 8}, {"lm_head.weight": "transformer.word_embeddings.weight"}),
    "t5": (
        {"embedding": 1, "linear": 32},
        dict.fromkeys(
            ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"], "shared.weight"
        ),
    ),
    "mixtral": ({"embedding": 1, "linear": 9, "experts": 4}, {}),
    "qwen3-moe": ({"embedding": 1, "linear": 9, "experts": 4}, {}),
    "mamba": ({"embedding": 1, "linear": 8}, {"lm_head.weight": "backbone.embeddings.weight"}),
    "bert": (
        {"embedding": 2, "linear": 13},
        {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    ),
}  # fmt: skip


def keep(inventory: Inventory, name: str) -> str:
    reason = inventory.params[name].keep
    assert reason is not None, name
    return reason


def test_the_table_names_every_tiny_model() -> None:
    assert set(EXPECTED) == set(TINY)


@pytest.mark.parametrize("name", TINY)
def test_kinds_and_ties(name: str) -> None:
    inventory = take_inventory(TINY[name]())
    kinds, tied = EXPECTED[name]
    assert (
        Counter("linear" if p.kind == "head" else p.kind for p in inventory.params.values() if p.keep is None) == kinds
    )
    assert inventory.tied == tied
    assert inventory.model_class == TINY[name]().architectures[0]
    for param in inventory.params.values():
        assert param.transposed == (param.kind == "conv1d")
        assert (param.kind != "other") or param.keep


@pytest.mark.parametrize("name", TINY)
def test_names_and_shapes_are_those_of_named_parameters(name: str) -> None:
    model = tiny_model(name)
    inventory = inventory_of(model)
    params = {key: tuple(p.shape) for key, p in model.named_parameters()}
    assert set(inventory.params) <= set(model.state_dict())
    assert {k: p.shape for k, p in inventory.params.items() if p.keep != "buffer"} == {
        inventory.tied.get(key, key): shape for key, shape in params.items()
    }


def test_what_is_kept_and_why() -> None:
    mamba = take_inventory(TINY["mamba"]())
    assert "state" in keep(mamba, "backbone.layers.0.mixer.A_log")
    assert keep(mamba, "backbone.layers.0.mixer.conv1d.weight") == "convolution"
    assert keep(mamba, "backbone.layers.0.mixer.D") == "vector"
    t5 = take_inventory(TINY["t5"]())
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert "relative attention bias" in keep(t5, bias)
    mixtral = take_inventory(TINY["mixtral"]())
    assert "router" in keep(mixtral, "model.layers.0.mlp.gate.weight")
    assert keep(take_inventory(TINY["bert"]()), "bert.embeddings.token_type_embeddings.weight") == "too thin: 2 x 32"


def test_a_router_as_wide_as_it_likes_is_kept() -> None:
    """64 experts make a router that is no longer thin."""
    config = TINY["qwen3-moe"]()
    config.num_experts = 64
    assert "router" in keep(take_inventory(config), "model.layers.0.mlp.gate.weight")


def test_experts_stored_transposed() -> None:
    from transformers import GptOssConfig, Llama4TextConfig

    small = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 4, "vocab_size": 64,
    }  # fmt: skip
    for config in (
        GptOssConfig(architectures=["GptOssForCausalLM"], **small),  # declares is_transposed
        Llama4TextConfig(architectures=["Llama4ForCausalLM"], intermediate_size_mlp=48, pad_token_id=0, **small),
    ):
        inventory = take_inventory(config)
        experts = {n.rpartition(".")[2]: p for n, p in inventory.params.items() if p.kind == "experts"}
        assert set(experts) == {"gate_up_proj", "down_proj"}
        assert experts["gate_up_proj"].shape == (4, 32, 96) and experts["gate_up_proj"].transposed
        assert experts["down_proj"].shape == (4, 48, 32) and experts["down_proj"].transposed


def test_a_config_without_architectures_gets_the_language_model() -> None:
    config = TINY["llama"]()
    config.architectures = None
    assert take_inventory(config).model_class == "LlamaForCausalLM"


class Odd(nn.Module):
    """Everything that a user's own module may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight
        self.shared = nn.Linear(32, 32)
        self.again = self.shared
        self.thin = nn.Linear(32, 3)
        self.attention = nn.MultiheadAttention(32, 4)
        self.recurrent = nn.LSTM(32, 32)
        self.convolution = nn.Conv2d(16, 16, 3)
        self.bounded = nn.Embedding(40, 32, max_norm=1.0)
        self.stack = nn.Parameter(torch.randn(3, 16, 20))
        self.token = nn.Parameter(torch.randn(1, 20, 32))
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("table", torch.randn(32, 32))
        self.register_buffer("scratch", torch.randn(32, 32), persistent=False)


def test_any_module_of_ones_own() -> None:
    inventory = inventory_of(Odd())
    kinds = {name: param.kind for name, param in inventory.params.items() if param.keep is None}
    assert kinds == {"embed.weight": "embedding", "shared.weight": "linear", "stack": "experts"}
    assert inventory.tied == {
        "head.weight": "embed.weight", "again.weight": "shared.weight", "again.bias": "shared.bias"
    }  # fmt: skip
    assert keep(inventory, "thin.weight").startswith("too thin")
    assert keep(inventory, "attention.in_proj_weight") == "read directly by MultiheadAttention"
    assert keep(inventory, "attention.out_proj.weight") == "read directly by MultiheadAttention"
    assert keep(inventory, "recurrent.weight_ih_l0") == "read directly by LSTM"
    assert keep(inventory, "convolution.weight") == "convolution"
    assert "max_norm" in keep(inventory, "bounded.weight")
    assert "3-D" in keep(inventory, "token")
    assert keep(inventory, "scalar") == "scalar" and keep(inventory, "table") == "buffer"
    assert "scratch" not in inventory.params
    assert set(inventory.params) | set(inventory.tied) == set(Odd().state_dict())


def test_ties_by_memory_where_the_parameter_objects_differ() -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    model[1].weight.data = model[0].weight.data
    assert inventory_of(model).tied == {"1.weight": "0.weight"}


def test_a_model_of_hundreds_of_billions_costs_nothing() -> None:
    from transformers import LlamaConfig, Qwen3MoeConfig

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    dense = take_inventory(
        LlamaConfig(
            architectures=["LlamaForCausalLM"], hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
            num_attention_heads=128, num_key_value_heads=8, vocab_size=128256,
        )
    )  # fmt: skip
    sparse = take_inventory(
        Qwen3MoeConfig(
            architectures=["Qwen3MoeForCausalLM"], hidden_size=4096, moe_intermediate_size=1536, num_experts=128,
            num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4, head_dim=128, vocab_size=151936,
        )
    )  # fmt: skip
    assert sum(torch.Size(p.shape).numel() for p in dense.params.values()) == 405_853_388_800
    assert 234e9 < sum(torch.Size(p.shape).numel() for p in sparse.params.values()) < 236e9
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 500e6
    assert time.perf_counter() - start < 60
