"""transformers knows `quant_method: lowbit`: `from_pretrained` builds a model of packed weights.

Nothing of transformers is patched: a config class and a quantizer are registered under our name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.errors import SourceError
from lowbit.formats import parse_format
from lowbit.nn.packed import PackedWeight
from lowbit.nn.swap import dequantize_, owner_of, packed_weights, place


class LowbitConfig(QuantizationConfigMixin):
    """`quantization_config` of a saved model: every packed tensor with its format, and what is tied to it."""

    def __init__(
        self,
        tensors: dict[str, dict[str, Any]] | None = None,
        tied: dict[str, str] | None = None,
        recipe: str = "",
        version: str = "",
        **unknown: Any,
    ) -> None:
        self.quant_method = "lowbit"  # type: ignore[assignment]
        self.tensors, self.tied, self.recipe, self.version = tensors or {}, tied or {}, recipe, version
        unknown.pop("quant_method", None)
        if unknown:
            raise SourceError(f"quantization_config has {sorted(unknown)}, which this version of lowbit does not know; update it")

    def packed(self, name: str, dtype: torch.dtype) -> PackedWeight:
        """The empty (meta) weight that `name` is to be loaded into."""
        entry = self.tensors[name]
        fmt = parse_format(str(entry["format"]))
        return PackedWeight(fmt, tuple(entry["shape"]), transposed=bool(entry.get("transposed")), dtype=dtype)


class LowbitQuantizer(HfQuantizer):
    """Puts packed weights where the checkpoint has them, and ties what was tied."""

    requires_calibration = True  # from_pretrained only loads; quantizing is lowbit.quantize
    quantization_config: LowbitConfig

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Stored parts keep their types; what was kept in float follows `dtype`.

        The loader does not name the tensor here, but it passes the type of what it will replace: parts already
        have the type they are stored in.
        """
        return super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        dtype = model.dtype
        for name in self.quantization_config.tensors:
            place(model, name, self.quantization_config.packed(name, dtype))
            owner_of(model, name)[0]._is_hf_initialized = True
        for alias in self._aliases():
            # Nothing is loaded here: the packed weight takes this place when it has its values.
            owner, last = owner_of(model, alias)
            owner._parameters[last] = None
            owner._is_hf_initialized = True
            model.all_tied_weights_keys.pop(alias, None)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        packed = dict(packed_weights(model))
        for alias in self._aliases():
            place(model, alias, packed[self.quantization_config.tied[alias]])
        _keep_tied(model, self._aliases())
        return model

    def _aliases(self) -> list[str]:
        config = self.quantization_config
        return [alias for alias, name in config.tied.items() if name in config.tensors]

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> nn.Module:
        return dequantize_(model, dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _keep_tied(model: Any, aliases: list[str]) -> None:
    """`tie_weights()` called later must not look for parameters: shared modules are tied by being the same."""
    for path, module in model.named_modules():
        keys = getattr(module, "_tied_weights_keys", None)
        if isinstance(keys, dict):
            prefix = path + "." if path else ""
            module._tied_weights_keys = {k: v for k, v in keys.items() if prefix + k not in aliases}


def register() -> None:
    """Tell transformers; a second call does nothing."""
    if "lowbit" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("lowbit")(LowbitConfig)
        register_quantizer("lowbit")(LowbitQuantizer)
