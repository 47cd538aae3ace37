"""What a transformers model declares as tied, where the weights are packed: their parts are, one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lowbit.nn.packed import PackedWeight
from lowbit.nn.swap import owner_of


def packed_by_every_name(model: nn.Module) -> dict[str, PackedWeight]:
    """A tied weight under each of its names: modules list an alias first where its owner comes first, as in XLM-RoBERTa."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, PackedWeight)}


def tie_parts(model: Any, packed: Mapping[str, PackedWeight], aliases: Mapping[str, str]) -> None:
    """Declare the stored parts as tied where the whole weights were, so that `tie_weights` and saving find them."""
    parts = {
        f"{alias}.{part}": f"{name}.{part}"
        for alias, name in aliases.items()
        for part, _ in packed[name].named_buffers()
    }
    for module, prefix in tying(model):
        keys = {k: v for k, v in module._tied_weights_keys.items() if prefix + k not in aliases}
        inside = {k: v for k, v in parts.items() if k.startswith(prefix) and v.startswith(prefix)}
        if len(keys) < len(module._tied_weights_keys):
            module._tied_weights_keys = keys | {k[len(prefix) :]: v[len(prefix) :] for k, v in inside.items()}
    declared = {prefix + k for module, prefix in tying(model) for k in module._tied_weights_keys}
    if rest := {k: v for k, v in parts.items() if k not in declared}:
        model._tied_weights_keys = (model._tied_weights_keys or {}) | rest
    if hasattr(model, "all_tied_weights_keys"):
        kept = {k: v for k, v in model.all_tied_weights_keys.items() if k not in aliases}
        model.all_tied_weights_keys = kept | parts


def untie_parts(model: Any, aliases: dict[str, str]) -> None:
    """Undo `tie_parts`: what is tied are whole weights again."""
    for module, _ in tying(model):
        module.__dict__.pop("_tied_weights_keys", None)
    whole = {k: v for k, v in model.all_tied_weights_keys.items() if not k.startswith(tuple(f"{a}." for a in aliases))}
    model.all_tied_weights_keys = whole | aliases


def tying(model: Any) -> list[tuple[Any, str]]:
    """(module, prefix of its names) of every module that declares what it ties."""
    named = model.named_modules(remove_duplicate=False)
    return [
        (m, f"{path}." if path else "") for path, m in named if isinstance(getattr(m, "_tied_weights_keys", None), dict)
    ]


def separate(model: Any, aliases: Iterable[str]) -> None:
    """Give each alias a float parameter of its own, for a class that ties nothing: what it saves holds every name."""
    for alias in aliases:
        owner, last = owner_of(model, alias)
        copied = getattr(owner, last).detach().clone()
        owner.register_parameter(last, nn.Parameter(copied, requires_grad=False))
        model.all_tied_weights_keys.pop(alias, None)
