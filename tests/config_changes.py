"""For every field of a config, another value that it might have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_SIZES = {"vocab_size": 192, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 48}
_WORDS = {
    "hidden_act": ("gelu", "relu"),
    "hidden_activation": ("gelu", "silu"),
    "activation_function": ("relu", "gelu"),
}
_LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}
_SKIP = {"transformers_version", "architectures", "model_type", "id2label", "label2id", "dtype", "_name_or_path", "problem_type",
         "return_dict", "quantization_config"}  # fmt: skip


def changes(config: Any) -> Iterator[tuple[str, Any]]:
    """(name of a field, another value) for each field of the class, by the type of what it has."""
    fields = config.to_dict()
    for name, value in fields.items():
        if name in _SKIP or name.endswith("token_id"):
            continue
        if name in _SIZES:
            yield name, _SIZES[name]
        elif name in _WORDS:
            yield from ((name, word) for word in _WORDS[name] if word != value)
        elif name == "rope_parameters":
            if set(value) & {"full_attention", "sliding_attention"}:
                yield name, {**value, "full_attention": _LINEAR}
                yield name, {**value, "sliding_attention": {"rope_type": "default", "rope_theta": 77.0}}
            else:
                yield name, {**value, "rope_theta": 77.0}
                yield name, {**value, **_LINEAR}
        elif name == "layer_types":
            yield name, list(reversed(value)) if len(set(value)) > 1 else ["sliding_attention"] * len(value)
        elif isinstance(value, bool):
            yield name, not value
        elif name == "num_key_value_heads":
            yield name, 1
            yield name, fields["num_attention_heads"]
        elif name in ("num_attention_heads", "max_position_embeddings", "original_max_position_embeddings"):
            yield name, value * 2
        elif isinstance(value, int):
            yield name, value + 1 if value < 5 else value // 2
        elif isinstance(value, float):
            yield name, value * 2 + (0.01 if value == 0 else 0.0)
        elif value is None:
            yield from ((name, other) for other in (True, 7, 1.5))
        elif isinstance(value, list):
            yield name, [1 - v for v in value] if value and set(value) <= {0, 1} else [0]
