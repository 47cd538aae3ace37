"""Tiny random models of many architectures, and a tiny tokenizer, for the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 128
_ROPE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _config(name: str, architecture: str, **values: object) -> PretrainedConfig:
    return getattr(transformers, name)(architectures=[architecture], **values)


TINY: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: _config("LlamaConfig", "LlamaForCausalLM", **_ROPE),
    "llama-tied": lambda: _config("LlamaConfig", "LlamaForCausalLM", tie_word_embeddings=True, **_ROPE),
    "mistral": lambda: _config("MistralConfig", "MistralForCausalLM", head_dim=8, **_ROPE),
    "qwen2": lambda: _config("Qwen2Config", "Qwen2ForCausalLM", tie_word_embeddings=True, **_ROPE),
    "qwen3": lambda: _config("Qwen3Config", "Qwen3ForCausalLM", head_dim=8, tie_word_embeddings=True, **_ROPE),
    "gemma2": lambda: _config("Gemma2Config", "Gemma2ForCausalLM", head_dim=8, **_ROPE),
    "gemma3": lambda: _config("Gemma3TextConfig", "Gemma3ForCausalLM", head_dim=8, **_ROPE),
    "phi": lambda: _config("PhiConfig", "PhiForCausalLM", **_ROPE),
    "gpt2": lambda: _config(
        "GPT2Config", "GPT2LMHeadModel", vocab_size=VOCAB, n_positions=128, n_embd=32, n_layer=2, n_head=4, **_IDS
    ),
    "gpt-neox": lambda: _config(
        "GPTNeoXConfig", "GPTNeoXForCausalLM", **{k: v for k, v in _ROPE.items() if k != "num_key_value_heads"}
    ),
    "opt": lambda: _config(
        "OPTConfig", "OPTForCausalLM", vocab_size=VOCAB, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=32, **_IDS,
    ),
    "bloom": lambda: _config(
        "BloomConfig", "BloomForCausalLM", vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, **_IDS
    ),
    "falcon": lambda: _config(
        "FalconConfig", "FalconForCausalLM", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, **_IDS,
    ),
    "t5": lambda: _config(
        "T5Config", "T5ForConditionalGeneration", vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2,
        num_heads=4, decoder_start_token_id=0, eos_token_id=2, pad_token_id=0,
    ),
    "mixtral": lambda: _config(
        "MixtralConfig", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2, head_dim=8, **_ROPE
    ),
    "qwen3-moe": lambda: _config(
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        head_dim=8, decoder_sparse_step=1, **_ROPE,
    ),
    "mamba": lambda: _config(
        "MambaConfig", "MambaForCausalLM", vocab_size=VOCAB, hidden_size=32, state_size=16, num_hidden_layers=2,
        time_step_rank=16, **_IDS,
    ),
    "bert": lambda: _config(
        "BertConfig", "BertForMaskedLM", vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, pad_token_id=0,
    ),
}  # fmt: skip


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """The model `name` with every float tensor drawn from N(0, 0.1^2), so that no weight is all ones or zeros."""
    config = TINY[name]()
    torch.manual_seed(seed)
    model = getattr(transformers, config.architectures[0])(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.1)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 128 tokens: three special ones, letters, and the rest as unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *letters])}
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("a", "n"),
        ("an", "d"),
        ("i", "n"),
        ("e", "r"),
        ("Ġ", "t"),
        ("Ġ", "a"),
    ]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_tiny(name: str, folder: Path, tokenizer: bool = True, seed: int = 0) -> PreTrainedModel:
    """Save the tiny model `name` into `folder` as a Hugging Face folder and return it."""
    model = tiny_model(name, seed)
    model.save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return model
