"""Whether `from_pretrained` would find every tensor of a folder of lowbit: asked of names and shapes, before a byte is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lowbit.errors import SourceError
from lowbit.interchange.hf.conversion import plan_conversion
from lowbit.interchange.hf.models import meta_model
from lowbit.interchange.tensors import TensorSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_loadable(
    config: PretrainedConfig, quantization: Mapping[str, Any], stored: Mapping[str, TensorSpec], unknown: frozenset[str],
    where: str,
) -> None:  # fmt: skip
    """SourceError when transformers, given files with `stored`, would lack a tensor or take one for another.

    `quantization`: the `quantization_config` of the folder, by which packed weights stand in the empty model. `unknown`:
    tensors that the model does not know and that are kept all the same.
    """
    from lowbit.interchange.hf.quantizer import LowbitConfig, LowbitQuantizer

    model = meta_model(config)
    quantizer = LowbitQuantizer(LowbitConfig(**quantization), pre_quantized=True)
    quantizer._process_model_before_weight_loading(model, stored=stored)
    read = plan_conversion(model, stored, where, quantizer.update_weight_conversions([], model))
    strange = [name for name in read.extra if name not in unknown] + list(read.dropped)
    moved = [name for name in read.specs if read.parts(name) != (name,)]
    if strange or moved:
        raise SourceError(
            f"{where}: transformers would not read {(strange or moved)[0]!r} of the quantized folder as what it is, so the folder "
            f"would be another model than {type(model).__name__}; nothing was written"
        )
