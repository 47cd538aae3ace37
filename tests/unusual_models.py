"""Tiny random models whose blocks are not a plain chain over text: what each has that a chain has not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from tiny import VOCAB

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, **_IDS,
}  # fmt: skip
_SEEING = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "projection_dim": 32,
}  # fmt: skip
_BERT = {k: v for k, v in _TEXT.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}


def _llava() -> PretrainedConfig:
    text = transformers.LlamaConfig(**_TEXT)
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_SEEING), text_config=text, image_token_index=VOCAB - 1
    )


def _clip() -> PretrainedConfig:
    text = {k: v for k, v in _TEXT.items() if k != "num_key_value_heads"} | {"projection_dim": 32}
    return transformers.CLIPConfig(text_config=text, vision_config=_SEEING, projection_dim=32)


UNUSUAL: dict[str, tuple[str, Callable[[], PretrainedConfig]]] = {
    # a tower that text does not come to
    "llava": ("LlavaForConditionalGeneration", _llava),
    # two towers, of which one reads text, and no forward over text alone
    "clip": ("CLIPModel", _clip),
    # attention and MLP in lists of their own, added to what the one before was given
    "xlm": ("XLMWithLMHeadModel", lambda: transformers.XLMConfig(
        vocab_size=VOCAB, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=128, bos_index=1, eos_index=2, pad_index=0,
        **_IDS)),
    # later layers read keys and values that earlier ones put into a container
    "gemma3n": ("Gemma3nForCausalLM", lambda: transformers.Gemma3nTextConfig(
        **_TEXT | {"num_hidden_layers": 4, "intermediate_size": [64] * 4}, head_dim=8, vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=16, laurel_rank=16, num_kv_shared_layers=2, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4)),
    # one attention that several layers share, and embeddings that only some layers read again
    "zamba": ("ZambaForCausalLM", lambda: transformers.ZambaConfig(
        **_TEXT | {"num_hidden_layers": 5, "num_key_value_heads": 4}, attention_hidden_size=64, attention_head_dim=16, n_mamba_heads=2,
        mamba_d_state=16, mamba_d_conv=4, mamba_dt_rank=16, layers_block_type=["mamba", "hybrid", "mamba", "hybrid", "mamba"],
        use_mamba_kernels=False)),
    # a layer that is called once for each layer of the model
    "albert": ("AlbertForMaskedLM", lambda: transformers.AlbertConfig(**_BERT | {"num_hidden_layers": 3}, embedding_size=32)),
    # pooling between blocks, lists of lists, and a decoder that reads the first blocks again
    "funnel": ("FunnelForMaskedLM", lambda: transformers.FunnelConfig(
        vocab_size=VOCAB, block_sizes=[1, 2], num_decoder_layers=1, d_model=32, n_head=4, d_head=8, d_inner=64, pad_token_id=0)),
    # a table of sines that no checkpoint has
    "marian": ("MarianMTModel", lambda: transformers.MarianConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)),
    # arithmetic in the embeddings themselves
    "ctrl": ("CTRLLMHeadModel", lambda: transformers.CTRLConfig(
        vocab_size=VOCAB, n_positions=128, n_embd=32, dff=64, n_layer=3, n_head=4, **_IDS)),
}  # fmt: skip


def unusual_model(name: str, seed: int = 0) -> PreTrainedModel:
    """The model `name` with every float parameter drawn from N(0, 0.1^2), tables of sines left as they are."""
    architecture, config = UNUSUAL[name]
    torch.manual_seed(seed)
    made: Any = config()
    made.architectures = [architecture]
    model: PreTrainedModel = getattr(transformers, architecture)(made)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, param in model.named_parameters():
            if "embed_positions" not in key:
                param.copy_(torch.randn(param.shape, generator=generator) * 0.1)
    return model.eval()
