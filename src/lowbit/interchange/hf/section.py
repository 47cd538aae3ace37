"""What a config says of quantization, and how it is taken out and put in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowbit.interchange.hf.text_config import text_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SECTIONS = ("quantization_config", "compression_config")  # where config.json says how a model is quantized
# Where transformers does not know a quant_method it warns, and gives a model of random weights. This field names the file
# of weights, and with words in it every version raises an error that shows them; our quantizer takes it out first.
GUARD = "transformers_weights"
GUARD_WORDS = "packed by lowbit, so `pip install lowbit`, and `import lowbit` before from_pretrained"


def with_guard(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of a folder of lowbit, by which transformers without lowbit refuses it."""
    return {**config, GUARD: GUARD_WORDS}


def without_guard(config: Any) -> Any:
    """The config, without that field."""
    if getattr(config, GUARD, None) == GUARD_WORDS:
        delattr(config, GUARD)
    return config


def as_float(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the float model: what it says of quantization is taken out, and of code, which does not come along."""
    for part in (config, text_config(config)):
        for key in (*SECTIONS, "auto_map", GUARD):
            part.__dict__.pop(key, None)
    return config
