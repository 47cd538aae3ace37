"""The fields of config.json that lowbit, or transformers' shared code on its behalf, reads: name -> what it may be.

Three tables. ANY: fields that mean the same in every family, as loose as the strangest of them (numbers for each layer as a
list, null where a family has none). NUMBERS: patterns of names; a field that matches and is a number must be in the range,
and what is no number is the family's own business. DECODER: of the families whose layers are all alike, which the engine
runs by these fields alone: no lists, and the ranges of what can be computed.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.interchange.checks.rules import FLAG, NULL, OBJECT, TEXT, Rule, list_of, map_of, number, one_of, whole

MOST_LAYERS = 10_000  # no model is a tenth as deep, and transformers makes lists as long as this before it builds one
_SIZE, _TOKENS = 1 << 24, (1 << 31) - 1
ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh",
    "gelu_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu", "relu2", "relu6",
    "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh", "xielu",
)  # fmt: skip
TYPES = ("float32", "float16", "bfloat16", "float64", "float", "half", "double", "float8_e4m3fn", "float8_e5m2", "auto")

_sizes = whole(0, _SIZE) | NULL | list_of(whole(0, _SIZE) | NULL)
_positive = whole(1, _SIZE) | NULL | list_of(whole(0, _SIZE) | NULL)
_token = whole(-1, _TOKENS) | NULL | list_of(whole(-1, _TOKENS))
_dtype = one_of(*TYPES, *(f"torch.{name}" for name in TYPES)) | NULL
# A name with a slash is a repository whose code transformers would fetch and run.
_code = Rule("a name without a slash", lambda v: isinstance(v, str) and "/" not in v and "\\" not in v)

ANY: Mapping[str, Rule] = {
    "model_type": TEXT, "architectures": list_of(TEXT) | NULL, "transformers_version": TEXT | NULL | number(0, 1000),
    "dtype": _dtype, "torch_dtype": _dtype, "auto_map": OBJECT | NULL, "attribute_map": OBJECT | NULL,
    "attn_implementation": _code | NULL | map_of(_code | NULL),
    "_attn_implementation": _code | NULL | map_of(_code | NULL),
    "_attn_implementation_internal": _code | NULL | map_of(_code | NULL),
    "experts_implementation": _code | NULL | map_of(_code | NULL),
    "_experts_implementation": _code | NULL | map_of(_code | NULL),
    "_experts_implementation_internal": _code | NULL | map_of(_code | NULL),
    "_name_or_path": TEXT | NULL, "name_or_path": TEXT | NULL, "_commit_hash": TEXT | NULL,
    "num_labels": whole(0, 1 << 20) | NULL, "id2label": OBJECT | NULL, "label2id": OBJECT | NULL,
    "return_dict": FLAG | NULL, "output_hidden_states": FLAG | NULL, "output_attentions": FLAG | NULL,
    "is_encoder_decoder": FLAG | NULL, "tie_word_embeddings": FLAG | NULL, "use_cache": FLAG | NULL,
    "chunk_size_feed_forward": whole(0, _SIZE) | NULL,
    "hidden_size": _positive, "intermediate_size": _positive, "vocab_size": whole(1, 1 << 28) | NULL,
    "num_attention_heads": _positive, "num_key_value_heads": _positive, "head_dim": _sizes,
    "num_hidden_layers": whole(1, MOST_LAYERS) | NULL | OBJECT,
    "n_layer": whole(1, MOST_LAYERS) | NULL, "n_layers": whole(1, MOST_LAYERS) | NULL,
    "n_embd": _positive, "n_head": _positive, "d_model": _positive, "n_inner": _sizes,
    "max_position_embeddings": number(1, _TOKENS) | NULL, "n_positions": whole(1, _SIZE) | NULL,
    "sliding_window": whole(0, _TOKENS) | NULL | list_of(whole(0, _TOKENS) | NULL),
    "layer_types": list_of(TEXT, most=MOST_LAYERS) | NULL,
    "no_rope_layers": list_of(whole(0, MOST_LAYERS), most=MOST_LAYERS) | NULL,
    "hidden_act": one_of(*ACTIVATIONS) | NULL, "hidden_activation": one_of(*ACTIVATIONS) | NULL,
    "rms_norm_eps": number(0, 1, above=True) | NULL, "layer_norm_eps": number(0, 1) | NULL,
    "layer_norm_epsilon": number(0, 1) | NULL,
    "initializer_range": number(0, 1e6) | NULL,
    "text_config": OBJECT | NULL, "vision_config": OBJECT | NULL, "audio_config": OBJECT | NULL,
    "quantization_config": OBJECT | NULL, "compression_config": OBJECT | NULL,
}  # fmt: skip

NUMBERS: Mapping[str, Rule] = {
    "*_token_id": whole(-1, _TOKENS),
    "*_layers": whole(0, MOST_LAYERS),
    "depth": whole(0, MOST_LAYERS),
    "*_groups": whole(0, _SIZE),
    "*_experts": whole(0, 1 << 20),
    "*_heads": whole(0, 1 << 20),
    "*_size": number(-1, 1 << 40),
    "*_dim": number(-1, 1 << 40),
    "*_eps": number(0, 1),
    "*_dropout": number(0, 1),
    "*_dropout_prob": number(0, 1),
    "dropout": number(0, 1),
    "*_pdrop": number(0, 1),
}

TOKEN_IDS: Mapping[str, Rule] = {
    "bos_token_id": _token,
    "eos_token_id": _token,
    "pad_token_id": _token,
    "decoder_start_token_id": _token,
}

# The fields without which the engine has no shape: where config.json leaves one out, transformers' class has its default.
NEEDED = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "rms_norm_eps",
    "max_position_embeddings",
)  # fmt: skip
# The fields whose default differs from family to family, though a model may have null in them.
GIVEN = ("num_key_value_heads", "rope_parameters")
_multiplier = number(-1e6, 1e6)
DECODER: Mapping[str, Rule] = {
    "hidden_size": whole(1, 1 << 20), "intermediate_size": whole(1, _SIZE), "vocab_size": whole(1, 1 << 28),
    "num_hidden_layers": whole(1, MOST_LAYERS), "num_attention_heads": whole(1, 1 << 14),
    "num_key_value_heads": whole(1, 1 << 14) | NULL, "head_dim": whole(1, 1 << 14) | NULL,
    "rms_norm_eps": number(0, 1, above=True), "max_position_embeddings": whole(1, _TOKENS),
    "original_max_position_embeddings": whole(1, _TOKENS) | NULL,
    "sliding_window": whole(0, _TOKENS) | NULL, "use_sliding_window": FLAG | NULL,
    "max_window_layers": whole(0, _SIZE) | NULL, "sliding_window_pattern": whole(1, MOST_LAYERS) | NULL,
    "_sliding_window_pattern": whole(1, MOST_LAYERS) | NULL, "no_rope_layer_interval": whole(1, MOST_LAYERS) | NULL,
    "no_rope_layers": list_of(whole(0, 1), most=MOST_LAYERS) | NULL,
    "attention_bias": FLAG | NULL, "mlp_bias": FLAG | NULL, "use_bidirectional_attention": FLAG | NULL,
    "attention_dropout": number(0, 1) | NULL,
    "query_pre_attn_scalar": number(0, 1e9, above=True),
    "attn_logit_softcapping": number(0, 1e9, above=True) | NULL,
    "final_logit_softcapping": number(0, 1e9, above=True) | NULL,
    "embedding_multiplier": _multiplier, "attention_multiplier": _multiplier, "residual_multiplier": _multiplier,
    "logits_scaling": number(0, 1e9, above=True),
    "num_experts": whole(1, 1 << 16), "num_local_experts": whole(1, 1 << 16), "num_experts_per_tok": whole(1, 1 << 16),
    "moe_intermediate_size": whole(1, _SIZE), "norm_topk_prob": FLAG, "decoder_sparse_step": whole(1, MOST_LAYERS),
    "mlp_only_layers": list_of(whole(0, MOST_LAYERS), most=MOST_LAYERS) | NULL,
    "pretraining_tp": whole(1, 1 << 10) | NULL,
}  # fmt: skip
