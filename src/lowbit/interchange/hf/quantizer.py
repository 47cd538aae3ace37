"""transformers knows `quant_method: lowbit`: `from_pretrained` builds a model of packed weights.

Nothing of transformers is patched: a config class and a quantizer are registered under our name.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.errors import SourceError
from lowbit.interchange.checks.section import Packed, read_section
from lowbit.interchange.files.safetensors_reader import read_header
from lowbit.interchange.files.settings import read_json
from lowbit.interchange.hf.float32_rules import float32_rules, spare_parts
from lowbit.interchange.hf.other_classes import Exactly, Fit, fit
from lowbit.interchange.hf.section import PART, without_guard
from lowbit.interchange.hf.ties import packed_by_every_name, separate, tie_parts, tying, untie_parts
from lowbit.interchange.hf.torch_pool import settle_torch_pool
from lowbit.nn.packed import PackedWeight
from lowbit.nn.swap import dequantize_, place

_NOTHING: dict[str, Any] = {}


class LowbitConfig(QuantizationConfigMixin):
    """`quantization_config` of a saved model: every packed tensor with its format, what is tied to it, and how the KV cache is stored.

    `part_of`: that of a config inside another one, for which what the outer one says holds; it says nothing itself.
    """

    def __init__(
        self,
        tensors: dict[str, dict[str, Any]] = _NOTHING,
        tied: dict[str, str] | None = None,
        recipe: str = "",
        version: str = "",
        part_of: str = "",
        kv: str = "",
        **others: Any,
    ) -> None:
        self.quant_method, self.part_of = "lowbit", part_of  # type: ignore[assignment]
        found = read_section(
            {"tensors": tensors, "tied": tied, "recipe": recipe, "version": version, "kv": kv, **others}, "config.json"
        )
        self.tensors, self.tied, self.recipe, self.version = (
            dict(tensors),
            dict(tied or {}),
            found.recipe,
            found.version,
        )
        self.kv, self._packed = found.kv, found.tensors

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        if self.part_of:
            return dict(PART)
        names = ("quant_method", "tensors", "tied", "recipe", "version", *(["kv"] if self.kv else []))
        return copy.deepcopy({name: getattr(self, name) for name in names})

    def packed(self, name: str, dtype: torch.dtype) -> PackedWeight:
        """The empty (meta) weight that `name` is to be loaded into."""
        found = self._packed[name]
        return PackedWeight(found.format, found.shape, transposed=found.transposed, dtype=dtype, inputs=found.inputs)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Of the parameter that `name` stands for, as the module has it."""
        packed: Packed = self._packed[name]
        return packed.module_shape

    def fit(self, model: Any, stored: Collection[str], folder: Path | None) -> Fit:
        """How these weights stand in the empty float `model`, of whichever class, where a `folder` has tensors of the names `stored`."""
        return fit(model, self._packed, self.tied, stored, folder)

    def fitted(self, found: Fit) -> LowbitConfig:
        """The same of a model that has other names, or fewer of these weights."""
        tensors = {name: self.tensors[folder] for name, folder in found.packed.items()}
        if tensors == self.tensors and found.tied == self.tied:
            return self
        return LowbitConfig(tensors, dict(found.tied), self.recipe, self.version, kv=self.kv)

    def packed_aliases(self) -> dict[str, str]:
        """Alias -> name of every packed weight that stands in several places."""
        return {alias: name for alias, name in self.tied.items() if name in self.tensors}


class LowbitQuantizer(HfQuantizer):
    """Puts packed weights where the checkpoint has them, and ties what was tied."""

    requires_calibration = True  # from_pretrained only loads; quantizing is lowbit.quantize
    quantization_config: LowbitConfig
    _files: Mapping[str, str] = {}  # tensor of the files -> its name in the model

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before files are looked for: take out what stops transformers where it does not know lowbit."""
        return without_guard(config)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, stored: Collection[str] = (), **kwargs: Any
    ) -> None:
        """`stored`: the tensors of the files, where there are no files yet."""
        settle_torch_pool()
        folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        if self.quantization_config.part_of and folder is not None:
            self.quantization_config = _whole(folder)
        for file in checkpoint_files or ():
            stored = [*stored, *read_header(file).entries]
        found = self.quantization_config.fit(model, stored, folder)
        self._files = found.files
        self.quantization_config = self.quantization_config.fitted(found)
        computed_in = float32_rules(model)
        for name in self.quantization_config.tensors:
            _check_place(model, name, self.quantization_config.shape_of(name))
            weight = self.quantization_config.packed(name, computed_in(name))
            weight._is_hf_initialized = True  # what initializes modules with missing tensors leaves it alone
            place(model, name, weight)
        aliases = self.quantization_config.packed_aliases()
        for alias, name in aliases.items():
            shape = self.quantization_config.shape_of(name)
            _check_place(model, alias, shape)
            place(model, alias, _Awaited(torch.Size(shape)))
        # Some classes list the head among what is tied even where it has a weight of its own, as T5 does.
        placed = {*self.quantization_config.tensors, *aliases}
        ties = model.all_tied_weights_keys.items()
        model.all_tied_weights_keys = {k: v for k, v in ties if not {k, v} & placed}
        spare_parts(model)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """One rule that knows every tensor of the files: rules for checkpoints of other programs have been asked already."""
        return [Exactly(self._files)] if self._files else super().update_weight_conversions(weight_conversions, model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        packed = packed_by_every_name(model)
        for alias, name in self.quantization_config.packed_aliases().items():
            place(model, alias, packed[name])
        finish(model, packed, self.quantization_config.packed_aliases())
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> nn.Module:
        for cast in CASTS:
            model.__dict__.pop(cast, None)
        aliases = self.quantization_config.packed_aliases()
        untie_parts(model, aliases)
        dequantize_(model, dtype)
        if not tying(model):
            separate(model, aliases)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on packed weights are: gradients pass through these, which stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _whole(folder: Path) -> LowbitConfig:
    """What config.json of a folder says of all its weights, for a class whose config is a part of it."""
    section: Any = read_json(folder / "config.json").get("quantization_config")
    read_section(section, str(folder / "config.json"))
    return LowbitConfig(**section)


class _Awaited(nn.Module):
    """Keeps the place of a tied weight while the one that it shares is loaded; has nothing to load itself."""

    _is_hf_initialized = True

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape


def _check_place(model: Any, name: str, shape: tuple[int, ...]) -> None:
    """SourceError where the model has no parameter `name` of this shape."""
    module, _, last = name.rpartition(".")
    try:
        found: Any = getattr(model.get_submodule(module), last, None)
    except AttributeError:
        found = None
    if not hasattr(found, "shape"):
        raise SourceError(
            f"config.json: quantization_config names {name!r}, and a {type(model).__name__} has no such weight; "
            "copy the folder again"
        )
    if tuple(found.shape) != shape:
        raise SourceError(
            f"config.json: quantization_config says shape {list(shape)} of {name!r}, and a {type(model).__name__} of this "
            f"config has {list(found.shape)}; copy the folder again"
        )


def attach(model: Any, config: dict[str, Any]) -> None:
    """Make a transformers model whose weights were packed in memory what `from_pretrained` would have given."""
    quantizer = LowbitQuantizer(LowbitConfig(**config), pre_quantized=True)
    finish(model, packed_by_every_name(model), quantizer.quantization_config.packed_aliases())
    model.hf_quantizer = quantizer
    model.is_quantized, model.quantization_method = True, quantizer.quantization_config.quant_method
    model.config.quantization_config = quantizer.quantization_config


def finish(model: Any, packed: Mapping[str, PackedWeight], aliases: Mapping[str, str]) -> None:
    """Give a model with packed weights what transformers asks of it once they have their values."""
    for weight in packed.values():
        weight.settle()
    tie_parts(model, packed, aliases)
    model._weight_conversions = []  # it is saved under its own names, which are those of its quantization_config
    for name, dtype in CASTS.items():
        setattr(model, name, Cast(model, dtype))


class Cast:
    """Stands in the place of `model.half` and `model.float`, which transformers refuses for every quantized model.

    An attribute of the model, not a class, so that its class, names and files stay as they are.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype

    def __call__(self) -> nn.Module:
        """Let it compute in another type, as `model.to(dtype)` does; packed weights stay as they are stored."""
        return self._model.to(self._dtype)


CASTS = {"half": torch.float16, "float": torch.float32}


def register(quantizer: type[LowbitQuantizer] = LowbitQuantizer) -> None:
    """Tell transformers; a second call does nothing."""
    if "lowbit" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("lowbit")(LowbitConfig)
        register_quantizer("lowbit")(quantizer)
