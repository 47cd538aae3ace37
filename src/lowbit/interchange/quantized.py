"""A quantized checkpoint beside the float model that it belongs to: its config, and which weights the model keeps turned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lowbit.interchange.inventory import inventory_of
from lowbit.interchange.planes import turned
from lowbit.interchange.stored import StoredWeight

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SECTIONS = ("quantization_config", "compression_config")  # where config.json says how a model is quantized


def as_float(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the float model: what it says of quantization is taken out."""
    for part in (config, config.get_text_config()):
        for key in SECTIONS:
            part.__dict__.pop(key, None)
    return config


def oriented(weights: Mapping[str, StoredWeight], model: PreTrainedModel) -> dict[str, StoredWeight]:
    """The stored weights with those turned that modules of the model keep as [in, out], as GPT-2's Conv1D does."""
    turned_names = {name for name, param in inventory_of(model).params.items() if param.kind == "conv1d"}
    prefix = f"{model.base_model_prefix}."
    return {
        name: turned(weight) if name in turned_names or prefix + name in turned_names else weight
        for name, weight in weights.items()
    }
