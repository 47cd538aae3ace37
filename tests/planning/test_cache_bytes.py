"""Bytes of a cache in a format: what the plan says beside the tensors of a cache that is filled and stored, head by head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.display import as_text
from lowbit.errors import RecipeError
from lowbit.kv import CacheFormat, CacheSide
from lowbit.kv.round_trip import rotated, store
from lowbit.planning.kv_cache import CacheLayer, KVCache, kv_cache
from tiny import save_tiny

BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {}, "Gemma2": {"sliding_window": 6, "head_dim": 16},
    "DeepseekV3": {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
                   "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 4,
                   "n_group": 1, "topk_group": 1},
    "Lfm2": {},
}  # fmt: skip
FORMATS = [
    "int8", "int4:g8", "rotate@int4", "k=int8:sinks=2,v=int4:g8:recent=3", "uint2:4x1:min=fp16:recent=2",
    "kv=int4,k:0=int8,v:[12]=int16", "int3:g5", "int8:outliers=2",
]  # fmt: skip


def stored_bytes(x: torch.Tensor, side: CacheSide) -> int:
    """Of [heads, tokens, width], each head stored by itself; beside it what is kept exactly, token by token."""
    total = 0
    for head in x:
        if side.exact:
            total += 2 * head.numel()
            continue
        plain = CacheSide(side.format)
        parts = store(rotated(head) if side.rotate else head, plain).parts()
        total += sum(part.numel() * part.element_size() for part in parts.values())
        total += 2 * head.shape[0] * side.outliers
        newest = max(side.recent, side.group - 1)
        exact = [j for j in range(head.shape[0]) if j < side.sinks or j >= head.shape[0] - newest]
        total += 2 * len(exact) * head.shape[1]
    return total


@pytest.mark.parametrize("name", MODELS)
def test_the_plan_s_bytes_are_those_of_the_stored_tensors(name: str) -> None:
    t: Any = transformers
    torch.manual_seed(0)
    config = getattr(t, f"{name}Config")(**BASE | MODELS[name], architectures=[f"{name}ForCausalLM"])
    model = getattr(t, f"{name}ForCausalLM")(config).eval()
    for tokens in (3, 5):
        cache = t.DynamicCache(config=config)
        with torch.no_grad():
            model(input_ids=torch.arange(3, 3 + tokens)[None], past_key_values=cache, use_cache=True)
        planned = kv_cache(config)
        for text in FORMATS:
            form = CacheFormat.of(text)
            found = planned.state
            for i, layer in enumerate(cache.layers):
                if getattr(layer, "keys", None) is not None and layer.keys.dim() == 4:
                    found += stored_bytes(layer.keys[0].float(), form.side(i, "k"))
                    found += stored_bytes(layer.values[0].float(), form.side(i, "v"))
            assert planned.stored(form).bytes_at(tokens) == found, (text, tokens)


def test_a_format_that_stores_numbers_as_they_are_takes_what_none_takes() -> None:
    kv = KVCache((CacheLayer(0, 2, 64, 64), CacheLayer(1, 2, 64, 64, 128), CacheLayer(2, 2, 64, 64, cross=True)), 100)
    exact = kv.stored(CacheFormat.of("int16"))
    for tokens in (0, 1, 127, 128, 129, 1000):
        assert exact.bytes_at(tokens) == kv.bytes_at(tokens)
    assert (exact.bytes_per_token, exact.full, exact.windowed, exact.read, exact.fixed) == (
        kv.bytes_per_token, kv.full, kv.windowed, kv.read, kv.fixed,
    )  # fmt: skip


def test_bytes_per_token_are_the_growth_of_the_cache() -> None:
    layer = CacheLayer(0, 3, 64, 64)
    for text in ("int8", "int4:g32", "kivi2", "simquant8", "int3:g5", "kvquant3"):
        kv = KVCache((layer,)).stored(CacheFormat.of(text))
        assert kv.bytes_at(2 * 6400) - kv.bytes_at(6400) == pytest.approx(6400 * kv.bytes_per_token, abs=6400)
    assert KVCache((layer,)).stored(CacheFormat.of("int4:g32")).bytes_per_token == 3 * 2 * (32 + 4)


def test_an_encoder_decoder_stores_both_of_its_caches() -> None:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=3, num_heads=4, vocab_size=64,
        architectures=["T5ForConditionalGeneration"],
    )  # fmt: skip
    kv = kv_cache(config).stored(CacheFormat.of("int8"))
    assert kv.bytes_per_token == kv.read == 3 * 2 * 4 * (8 + 2)
    assert kv.bytes_at(7) == 7 * 2 * kv.read


def test_a_plan_counts_the_recipe_s_cache_and_its_weights_are_the_same(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m")
    plain = lowbit.plan(tmp_path / "m", "int8:channel", context=100)
    less = lowbit.plan(tmp_path / "m", "int8:channel,kv=int4:g8", context=100)
    assert less.output_bytes == plain.output_bytes and less.kv_bytes < plain.kv_bytes == less.kv_bytes_before
    assert less.kv_bytes == less.kv.bytes_at(100) and less.to_json()["kv_format"] == "int4:g8"
    assert "stored as" in as_text(less, 80) and "kv=int4:g8" in as_text(less, 80)
    auto = lowbit.plan(tmp_path / "m", "int8:channel,kv=auto", context=100)
    assert auto.kv_bytes == plain.kv_bytes and "the cache is checked" in " ".join(as_text(auto, 80).split())


def test_more_room_for_weights_with_a_smaller_cache(tmp_path: Path) -> None:
    from lowbit.budget.reach import check_reach
    from lowbit.interchange.opening import open_headers
    from lowbit.recipes.recipe import Recipe

    save_tiny("llama", tmp_path / "m")
    source, context = open_headers(tmp_path / "m"), 100_000
    before = lowbit.plan(tmp_path / "m", "int4:g32", context=context)
    after = lowbit.plan(tmp_path / "m", "int4:g32,kv=int4:g8", context=context)
    room = before.output_bytes + (before.kv_bytes + after.kv_bytes) // 2
    how: dict[str, Any] = {
        "candidates": ["int4:g32", "int8:g32"],
        "fit_memory": room,
        "overhead": 0,
        "context": context,
    }
    check_reach(source, Recipe.parse("int4:g32,kv=int4:g8"), **how)
    with pytest.raises(RecipeError, match="too little"):
        check_reach(source, Recipe.parse("int4:g32"), **how)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("int8:channel,kv=int8,k:7=int4", "names no layer of .*; theirs are 0 to "),
        ("int8:channel,kv=int8,kv:layers.0=int4", "names no layer"),
    ],
)
def test_what_does_nothing_for_a_model_is_refused(tmp_path: Path, recipe: str, words: str) -> None:
    save_tiny("llama", tmp_path / "m")
    with pytest.raises(RecipeError, match=words):
        lowbit.plan(tmp_path / "m", recipe)


def test_models_without_a_cache_refuse_a_format_of_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    t: Any = transformers
    t.BertModel(t.BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)).save_pretrained(tmp_path / "bert")  # fmt: skip
    t.MambaForCausalLM(t.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=16)).save_pretrained(tmp_path / "mamba")  # fmt: skip
    with pytest.raises(RecipeError, match="keeps no KV cache, so kv= has nothing to store"):
        lowbit.plan(tmp_path / "bert", "int8:channel,kv=int8")
    with pytest.raises(RecipeError, match="a state of one size"):
        lowbit.plan(tmp_path / "mamba", "int8:channel,kv=int8")
    with pytest.raises(RecipeError, match="no KV cache"):
        lowbit.plan(torch.nn.Sequential(torch.nn.Linear(64, 64)), "int8:channel,kv=int8")
