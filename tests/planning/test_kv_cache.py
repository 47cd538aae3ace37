"""What a plan says of caches beside the caches that transformers fills: bytes of all their tensors after some tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.display import as_text
from lowbit.planning.kv_cache import kv_cache

BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16}
HYBRIDS: dict[str, dict[str, Any]] = {
    "Llama": {}, "Mistral": {"sliding_window": 6}, "Gemma2": {"sliding_window": 6, "head_dim": 16},
    "Qwen3Next": {**DELTA, "head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 16},
    "Lfm2": {}, "RecurrentGemma": {"lru_width": 32, "attention_window_size": 6, "num_hidden_layers": 3},
    "Bamba": {"mamba_n_heads": 4, "mamba_d_state": 16, "attn_layer_indices": [1, 3]},
    "Jamba": {"mamba_d_state": 16, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
    "FalconH1": {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_d_ssm": 64},
    "GraniteMoeHybrid": {"mamba_n_heads": 4, "mamba_d_state": 16, "num_local_experts": 2, "num_experts_per_tok": 1,
                         "layer_types": ["mamba", "attention", "mamba", "attention"]},
    "Mamba": {"state_size": 16}, "Mamba2": {"state_size": 16, "num_heads": 4, "head_dim": 16, "n_groups": 1, "intermediate_size": 64},
    "MiniMax": {"num_local_experts": 2, "num_experts_per_tok": 1}, "GPT2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "num_key_value_heads": 4},
}  # fmt: skip


IN_MODULES = ("RecurrentGemma",)  # which keep their states beside the cache


def built(name: str, ending: str = "ForCausalLM", **values: Any) -> Any:
    t: Any = transformers
    torch.manual_seed(0)
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}{ending}"
    config = getattr(t, f"{name}Config")(**BASE | values, architectures=[kind])
    return getattr(t, kind)(config).eval()


def held(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that a cache holds, each once."""
    if isinstance(value, torch.Tensor):
        if value.dim() > 1 and value.is_floating_point() and value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from held(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from held(item, seen)
    elif "Cache" in type(value).__name__ or type(value).__module__.endswith("cache_utils"):
        yield from held(vars(value), seen)


def filled(model: Any, tokens: int, **more: Any) -> int:
    """Numbers in the cache after so many tokens, one at a time as when text is written."""
    cache = None
    with torch.no_grad():
        for i in range(tokens):
            ids = torch.tensor([[3 + i % 50]])
            given = {"decoder_input_ids": ids, **more} if more else {"input_ids": ids}
            out = model(**given, past_key_values=cache, use_cache=True) if i else model(**given, use_cache=True)
            cache = out.get("past_key_values")
        if cache is None:  # of a model that fills the one that it is given
            cache = transformers.DynamicCache(config=model.config)
            model(input_ids=torch.arange(tokens)[None], past_key_values=cache, use_cache=True)
    return sum(x.numel() for x in held(cache, set()))


@pytest.mark.parametrize("name", HYBRIDS)
def test_sizes_are_those_of_the_caches_that_transformers_fills(name: str) -> None:
    model = built(name, **HYBRIDS[name])
    found = kv_cache(model.config, itemsize=1)
    elsewhere = found.fixed if name in IN_MODULES else 0
    for tokens in (3, 5):
        assert found.bytes_at(tokens) - elsewhere == filled(model, tokens)


def test_layers_that_share_keys_and_values() -> None:
    config = transformers.Gemma3nTextConfig(
        **BASE, head_dim=16, sliding_window=6, num_kv_shared_layers=2, architectures=["Gemma3nForCausalLM"],
        layer_types=["full_attention", "sliding_attention"] * 2, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    found = kv_cache(config, itemsize=1)
    layer = 2 * 2 * 16
    assert found.full == layer and found.windowed == ((6, layer),)


def encoder_decoder(name: str) -> Any:
    t: Any = transformers
    torch.manual_seed(0)
    ids = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if name == "T5":
        config = t.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=3, num_heads=4, **ids,
            architectures=["T5ForConditionalGeneration"],
        )  # fmt: skip
        return t.T5ForConditionalGeneration(config).eval()
    shared = {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_target_positions": 30, **ids,
    }  # fmt: skip
    if name == "Whisper":
        config = t.WhisperConfig(max_source_positions=20, architectures=["WhisperForConditionalGeneration"], **shared)
        return t.WhisperForConditionalGeneration(config).eval()
    config = t.BartConfig(architectures=["BartForConditionalGeneration"], **shared)
    return t.BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_an_encoder_decoder_keeps_what_it_read_too(name: str) -> None:
    model = encoder_decoder(name)
    found = kv_cache(model.config, itemsize=1)
    held_ = filled(model, 4, input_ids=torch.arange(3, 10)[None])
    assert found.fixed + 4 * found.bytes_per_token + 7 * found.read == held_
    assert found.bytes_at(5) == 5 * (found.bytes_per_token + found.read)


def test_a_decoder_of_speech_keeps_a_sound_of_one_length() -> None:
    model = encoder_decoder("Whisper")
    found = kv_cache(model.config, itemsize=1)
    assert found.read == 0 and found.bytes_at(4) == filled(model, 4, input_features=torch.zeros(1, 80, 40))


NOTHING = {
    "BertForSequenceClassification": ("Bert", {}), "BertModel": ("Bert", {}), "LlamaForSequenceClassification": ("Llama", {}),
    "ViTForImageClassification": ("ViT", {}), "Wav2Vec2ForCTC": ("Wav2Vec2", {}), "T5EncoderModel": ("T5", {}),
    "XLMWithLMHeadModel": ("XLM", {}), "CLIPModel": ("CLIP", {}), "BertForMaskedLM": ("Bert", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTHING)
def test_what_writes_nothing_keeps_nothing(name: str) -> None:
    kind, values = NOTHING[name]
    config = getattr(transformers, f"{kind}Config")(architectures=[name], **values)
    assert kv_cache(config).bytes_at(1000) == 0


def screen(folder: Path) -> str:
    return as_text(lowbit.plan(folder, "int8:channel", context=100), 80)


def test_plans_say_what_is_kept_and_nothing_of_what_is_not(tmp_path: Path) -> None:
    built("Mamba", state_size=16).save_pretrained(tmp_path / "mamba")
    encoder_decoder("Bart").save_pretrained(tmp_path / "bart")
    model = transformers.BertModel(
        transformers.BertConfig(**{k: v for k, v in BASE.items() if k != "num_key_value_heads"})
    )
    model.save_pretrained(tmp_path / "bert")
    assert "KV cache" not in screen(tmp_path / "bert") and "state" not in screen(tmp_path / "bert")
    assert "whatever the length of the text" in screen(tmp_path / "mamba") and "KV cache" not in screen(
        tmp_path / "mamba"
    )
    assert "384 B a token written and 384 B a token read" in " ".join(screen(tmp_path / "bart").split())
    assert "it keeps no KV cache" in " ".join(lowbit.recommend(tmp_path / "bert", "8GB").text().split())
