"""Put packed weights into a model, and take dense ones out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from lowbit.errors import SourceError
from lowbit.nn.packed import PackedWeight


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter `name`, and its last name there."""
    path, _, last = name.rpartition(".")
    try:
        return model.get_submodule(path), last
    except AttributeError:
        raise SourceError(f"{type(model).__name__} has no module {path!r} for the weight {name!r}") from None


def place(model: nn.Module, name: str, packed: PackedWeight) -> None:
    """Let `packed` stand where the parameter `name` of `model` stands."""
    owner, last = owner_of(model, name)
    if last in owner._parameters:
        del owner._parameters[last]
    elif last not in owner._modules:
        raise SourceError(f"{type(owner).__name__} has no parameter {last!r} for the weight {name!r}")
    owner._modules[last] = packed


def swap(model: nn.Module, packed: Mapping[str, PackedWeight], tied: Mapping[str, str]) -> None:
    """Put every packed weight in its place, and in the places tied to it (`tied`: alias -> canonical name)."""
    for name, weight in packed.items():
        place(model, name, weight)
    for alias, name in tied.items():
        if name in packed:
            place(model, alias, packed[name])


def packed_weights(model: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    """(parameter name, packed weight), each shared one once."""
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            yield name, module


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn every packed weight back into a dense parameter, in place; shared weights stay shared."""
    dense: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, PackedWeight):
            if id(module) not in dense:
                dense[id(module)] = nn.Parameter(module.dequantize(dtype).contiguous(), requires_grad=False)
            owner, last = owner_of(model, name)
            del owner._modules[last]
            owner.register_parameter(last, dense[id(module)])
    return model
