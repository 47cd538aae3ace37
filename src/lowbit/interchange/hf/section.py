"""A quantized checkpoint beside the float model that it belongs to: its config, and which weights the model keeps turned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lowbit.interchange.inventory import inventory_of
from lowbit.interchange.readers.quantized import QuantizedWeight
from lowbit.interchange.readers.row_parts import turned

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

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
    for part in (config, config.get_text_config()):
        for key in (*SECTIONS, "auto_map", GUARD):
            part.__dict__.pop(key, None)
    return config


def oriented(weights: Mapping[str, QuantizedWeight], model: PreTrainedModel) -> dict[str, QuantizedWeight]:
    """The stored weights with those turned that modules of the model keep as [in, out], as GPT-2's Conv1D does."""
    turned_names = {name for name, param in inventory_of(model).params.items() if param.kind == "conv1d"}
    prefix = f"{model.base_model_prefix}."
    return {
        name: turned(weight) if name in turned_names or prefix + name in turned_names else weight
        for name, weight in weights.items()
    }
