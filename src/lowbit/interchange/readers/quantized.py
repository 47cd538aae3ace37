"""What a quantized checkpoint stores of each weight, whoever wrote it.

A scheme turns the tensors that one program stores for a weight (`q_proj.qweight`, `.qzeros`, `.scales`) into one
QuantizedWeight (`q_proj.weight`) that can be read as float values and, where a format of lowbit has the same levels, blocks and
scales, as a QTensor with the very same integers. A scheme is one file in `interchange/readers/schemes/` with a function
under `@scheme("its quant_method")`; nothing else knows its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from lowbit.discovery import modules_of
from lowbit.errors import SourceError
from lowbit.formats import Format, Inputs, QTensor
from lowbit.interchange.checks.foreign import check_foreign, method_of
from lowbit.interchange.inventory import inventory_of
from lowbit.interchange.tensors import TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ReadPart = Callable[[str], Tensor]
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight of `shape` [..., out, in] and the checkpoint tensors `parts` that it is made of.

    `quantized` reads it as it is stored; `format` is that of what it gives, or None where no format of lowbit has these
    levels (`why` says so) and only `values`, float32 of `shape`, can be read. `inputs`: what becomes of the inputs
    of the layer in the program that wrote it, with the tensors `input_parts` (see `Inputs.parts`). `transposed`: the model keeps
    the weight as [..., in, out]. `note`: what of the checkpoint is not carried over.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    format: Format | None = None
    quantized: Callable[[ReadPart], QTensor] | None = None
    values: Callable[[ReadPart], Tensor] | None = None
    why: str = ""
    inputs: Inputs | None = None
    input_parts: Callable[[ReadPart], dict[str, Tensor]] | None = None
    transposed: bool = False
    note: str = ""

    def read(self, read: ReadPart) -> Tensor:
        """The values that the stored parts stand for, float32, as the model keeps them."""
        if self.values is not None:
            dense = self.values(read)
        elif self.quantized is not None:
            dense = self.quantized(read).dequantize()
        else:
            raise ValueError("a stored weight has `quantized` or `values`")
        return dense.transpose(-1, -2) if self.transposed else dense

    def spec(self, name: str) -> TensorSpec:
        """The tensor that `read` gives."""
        *batch, rows, cols = self.shape
        return TensorSpec(name, (*batch, cols, rows) if self.transposed else self.shape, torch.float32)


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A quantized checkpoint: its weights by the checkpoint name that the float weight would have.

    `unused`: tensors that no weight of the model needs, such as scales of a KV cache. `about`: one line for people, such as
    "gptq, 4 bits, groups of 128".
    """

    weights: Mapping[str, QuantizedWeight]
    about: str
    unused: tuple[str, ...] = ()

    def specs(self, checkpoint: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """The checkpoint as it would be in float: each stored weight in place of its parts."""
        hidden = {part for weight in self.weights.values() for part in weight.parts} | set(self.unused)
        kept = {name: spec for name, spec in checkpoint.items() if name not in hidden}
        return kept | {name: weight.spec(name) for name, weight in self.weights.items()}


@dataclass(frozen=True)
class Checkpoint:
    """What a scheme is given: the `quantization_config` of config.json, the tensors, and a reader of small ones.

    `read` is None where only headers are at hand. `where` names the model in errors.
    """

    section: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]
    where: str
    read: ReadPart | None = None

    def modules(self, leaf: str) -> list[str]:
        """Names of the modules that have a tensor `leaf`, in the order of the checkpoint."""
        return [name.removesuffix(f".{leaf}") for name in self.tensors if name.endswith(f".{leaf}")]

    def spec(self, name: str) -> TensorSpec:
        """The spec of a tensor that must be there. SourceError otherwise."""
        if name not in self.tensors:
            self.refuse(name, "is missing, which the quantized weight beside it needs")
        return self.tensors[name]

    def whole(self, key: str, default: int | None = None, section: Mapping[str, Any] | None = None) -> int:
        """A whole number of the section, or of another one. SourceError where it is none."""
        value = (self.section if section is None else section).get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise SourceError(
                f"{self.where}: quantization_config says {key}={value!r}, which is no whole number; correct config.json"
            )
        return value

    def flag(self, key: str, default: bool, section: Mapping[str, Any] | None = None) -> bool:
        """A yes or no of the section, or of another one. SourceError where it is neither."""
        value = (self.section if section is None else section).get(key)
        if value is not None and not isinstance(value, bool):
            raise SourceError(
                f"{self.where}: quantization_config says {key}={value!r}, which is neither true nor false; correct config.json"
            )
        return default if value is None else value

    def refuse(self, tensor: str, problem: str) -> NoReturn:
        """SourceError about a tensor that cannot be as it is."""
        raise SourceError(f"{self.where}: tensor {tensor!r} {problem}; download the model again or correct config.json")


def _as_modules_keep(weights: Mapping[str, QuantizedWeight], model: PreTrainedModel) -> dict[str, QuantizedWeight]:
    """The weights, those transposed that modules of the model keep as [in, out], as GPT-2's Conv1D does."""
    transposed = {name for name, param in inventory_of(model).params.items() if param.kind == "conv1d"}
    prefix = f"{model.base_model_prefix}."
    return {
        name: replace(weight, transposed=True) if name in transposed or prefix + name in transposed else weight
        for name, weight in weights.items()
    }


Scheme = Callable[[Checkpoint], QuantizedCheckpoint]


_SCHEMES: dict[str, Scheme] = {}


def scheme(*methods: str) -> Callable[[Scheme], Scheme]:
    """Register a reader of checkpoints whose `quant_method` is one of `methods`."""

    def register(function: Scheme) -> Scheme:
        _SCHEMES.update(dict.fromkeys(methods, function))
        return function

    return register


def schemes() -> Mapping[str, Scheme]:
    """Every known scheme by `quant_method`."""
    modules_of("lowbit.interchange.readers.schemes")
    return dict(sorted(_SCHEMES.items()))


def quantized_checkpoint(checkpoint: Checkpoint, model: PreTrainedModel) -> QuantizedCheckpoint:
    """The weights of a quantized checkpoint of the meta `model`. SourceError for a method that is not known, or tensors that do not fit it."""
    method = method_of(checkpoint.section, checkpoint.where)
    found = schemes().get(method)
    if found is None:
        raise SourceError(
            f"{checkpoint.where} is already quantized with {method}, which lowbit cannot read (it reads "
            f"{', '.join(schemes())}); give the original float model"
        )
    check_foreign(checkpoint.section, f"{checkpoint.where}/config.json")
    made = found(checkpoint)
    if not made.weights and not made.unused:
        raise SourceError(
            f"{checkpoint.where}: config.json says that it is quantized with {method}, and no tensor is; remove "
            "quantization_config from config.json if these are float weights, or download the model again"
        )
    for name, spec in made.specs(checkpoint.tensors).items():
        if name.endswith(".weight") and len(spec.shape) > 1 and spec.dtype not in _FLOATS:
            checkpoint.refuse(name, f"is {spec.dtype}, and nothing beside it says how {method} quantized it")
    return replace(made, weights=_as_modules_keep(made.weights, model))
