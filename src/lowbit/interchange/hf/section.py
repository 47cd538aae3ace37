"""What a config says of quantization, and how it is taken out and put in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CACHE_TABLES = "kv_cache.safetensors"  # what calibration found for the cache format of a folder of lowbit; no weights
SECTIONS = ("quantization_config", "compression_config")  # where config.json says how a model is quantized
# Where transformers does not know a quant_method it warns, and gives a model of random weights. This field names the file
# of weights, and with words in it every version raises an error that shows them; our quantizer takes it out first.
GUARD = "transformers_weights"
GUARD_WORDS = "packed by lowbit, so `pip install lowbit`, and `import lowbit` before from_pretrained"
# What the config of a part says, such as that of the text model of CLIP: transformers reads nothing else for a class of that part.
PART = {"quant_method": "lowbit", "part_of": "config.json"}


def with_guard(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of a folder of lowbit, by which transformers without lowbit refuses it, also as a class of one of its parts."""
    parts = {
        key: with_guard({**value, "quantization_config": PART})
        for key, value in config.items()
        if key not in SECTIONS and isinstance(value, dict) and "model_type" in value
    }
    return {**config, **parts, GUARD: GUARD_WORDS}


def without_guard(config: Any) -> Any:
    """The config, without that field."""
    for part in _parts(config):
        if getattr(part, GUARD, None) == GUARD_WORDS:
            delattr(part, GUARD)
    return config


def as_float(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the float model: what it says of quantization is taken out, and of code, which does not come along."""
    for part in _parts(config):
        for key in (*SECTIONS, "auto_map", GUARD):
            part.__dict__.pop(key, None)
    return config


def _parts(config: Any) -> Iterator[Any]:
    """A config and every config inside it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from _parts(value)
