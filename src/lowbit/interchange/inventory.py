"""What each tensor of a model is: found by walking the modules, without a list of models.

`take_inventory` builds the model of a config on the meta device, where parameters have shapes
but no memory, so it costs nothing for a model of any size. `inventory_of` looks at a module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit.interchange.hf.models import meta_model
from lowbit.interchange.tensors import Kind
from lowbit.nn.packed import LIKE, PackedWeight

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MIN_SIDE = 16  # a matrix thinner than this costs more in scales than it saves
_ROUTER = re.compile(r"Router|Gate(?!d)")  # MixtralTopKRouter, Glm4MoeGate; not GatedMLP
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Param:
    """One stored tensor. `keep` is the reason why it must not be quantized, None when it may be.

    linear     [out, in], used as x W'
    head       the same, and it is the model's output embedding (lm_head)
    conv1d     [in, out], `transposed`: transformers' Conv1D of GPT-2
    embedding  [count, width]
    experts    [experts, out, in], or [experts, in, out] when `transposed`
    other      everything else; always kept
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    transposed: bool = False
    keep: str | None = None


@dataclass(frozen=True)
class Inventory:
    """Every stored tensor under one name; `tied` maps each other name of a shared tensor to that one."""

    params: Mapping[str, Param]
    tied: Mapping[str, str]
    model_class: str


def take_inventory(config: PretrainedConfig) -> Inventory:
    """The inventory of the model that `config` describes; reads no weight. SourceError when it cannot be built."""
    return inventory_of(meta_model(config))


def inventory_of(module: nn.Module, untied: frozenset[str] = frozenset()) -> Inventory:
    """The inventory of any module. Names in `untied` count as tensors of their own even where they are shared."""
    tied = {alias: name for alias, name in tied_names(module).items() if alias not in untied}
    parents = dict(module.named_modules(remove_duplicate=False))
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    params = {}
    for name, owner_name, leaf, tensor in _stored(module):
        if name not in tied:
            parent = parents.get(owner_name.rpartition(".")[0]) if owner_name else None
            param = _param(name, leaf, tensor, parents[owner_name], parent, owner_name)
            is_head = param.kind == "linear" and parents[owner_name] is head
            params[name] = replace(param, kind="head") if is_head else param
    return Inventory(params, tied, type(module).__name__)


def tied_names(module: nn.Module) -> dict[str, str]:
    """Alias -> canonical name of every tensor that is stored under several names.

    Found by identity (the same memory, or on the meta device the same object). The canonical name is
    the one that a transformers model ties the others to, else the first.
    """
    groups: dict[Any, list[str]] = {}
    for name, _, _, tensor in _stored(module):
        real = not tensor.is_meta and tensor.numel() > 0
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if real else id(tensor)
        groups.setdefault(key, []).append(name)
    preferred = set((getattr(module, "all_tied_weights_keys", None) or {}).values())
    tied = {}
    for names in groups.values():
        canonical = next((name for name in names if name in preferred), names[0])
        tied.update({name: canonical for name in names if name != canonical})
    return tied


def _stored(module: nn.Module) -> Iterator[tuple[str, str, str, torch.Tensor]]:
    """(name, name of the owner, leaf, tensor) of every tensor that state_dict() holds, in its order."""
    for owner_name, owner in module.named_modules(remove_duplicate=False):
        buffers = {k: b for k, b in owner._buffers.items() if k not in owner._non_persistent_buffers_set}
        for leaf, tensor in {**owner._parameters, **buffers}.items():
            if tensor is not None and not (isinstance(owner, PackedWeight) and leaf == LIKE):
                yield (f"{owner_name}.{leaf}" if owner_name else leaf), owner_name, leaf, tensor


def _param(
    name: str, leaf: str, tensor: torch.Tensor, owner: nn.Module, parent: nn.Module | None, owner_name: str
) -> Param:
    """Classify one tensor by the class of the module that owns it."""
    from transformers import Conv1D

    owner_class, shape = type(owner).__name__, tuple(tensor.shape)
    matrix = leaf == "weight" and len(shape) == 2 and tensor.is_floating_point()

    def param(kind: Kind, keep: str | None = None, transposed: bool = False) -> Param:
        return Param(name, shape, kind, transposed, keep)

    if not isinstance(tensor, nn.Parameter):
        return param("other", "buffer")
    if isinstance(owner, nn.modules.conv._ConvNd):
        return param("other", "convolution")
    if matrix and isinstance(owner, nn.Linear):
        keep = _router(owner, parent) or _thin(shape)
        if isinstance(parent, nn.MultiheadAttention):
            keep = "read directly by MultiheadAttention"
        return param("linear", keep)
    if matrix and isinstance(owner, Conv1D):
        return param("conv1d", _thin(shape), transposed=True)
    if matrix and isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        keep = _thin(shape)
        if "relative_attention_bias" in owner_name:
            keep = "relative attention bias, a few numbers for each head"
        elif owner.max_norm is not None:
            keep = "an embedding with max_norm changes its own weight"
        return param("embedding", keep)
    if len(shape) == 3 and tensor.is_floating_point() and shape[0] > 1 and min(shape[1:]) >= MIN_SIDE:
        return param("experts", transposed=_experts_transposed(owner, leaf, shape))
    if len(shape) == 2:
        if _ROUTER.search(owner_class):
            return param("other", "router of a mixture of experts")
        if isinstance(owner, (nn.RNNBase, nn.MultiheadAttention)):
            return param("other", f"read directly by {owner_class}")
        return param("other", f"2-D parameter of {owner_class}, used as state not as a weight")
    if len(shape) < 2:
        return param("other", "vector" if shape else "scalar")
    return param("other", f"{len(shape)}-D parameter of {owner_class}, no stack of matrices")


def _thin(shape: tuple[int, ...]) -> str | None:
    rows, cols = shape
    return f"too thin: {rows} x {cols}" if min(rows, cols) < MIN_SIDE else None


def _router(owner: nn.Linear, parent: nn.Module | None) -> str | None:
    """A reason when this Linear chooses experts: by its class or its parent's, or by its output count."""
    chooses = any(_ROUTER.search(type(m).__name__) for m in (owner, parent) if m is not None)
    if not chooses and parent is not None:
        chooses = owner.out_features in set(_expert_counts(parent))
    return "router of a mixture of experts" if chooses else None


def _expert_counts(block: nn.Module) -> Iterator[int]:
    """How many experts `block` holds, if it is a mixture: from its children, else from its own attributes."""
    experts = [m for n, m in block.named_children() if n == "experts" or "Experts" in type(m).__name__]
    for child in experts:
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield len(child)
        yield from (p.shape[0] for p in child.parameters(recurse=False) if p.dim() == 3)
    for holder in (block, *experts) if experts else ():
        yield from (n for key in _EXPERT_COUNTS if isinstance(n := getattr(holder, key, None), int))


def _experts_transposed(owner: nn.Module, leaf: str, shape: tuple[int, ...]) -> bool:
    """Whether a 3-D parameter is stored [experts, in, out].

    The module says so (`is_transposed`); else its sizes do: [experts, in_features, out_features], or
    the hidden size standing first in a projection up, last in a projection down.
    """
    declared = getattr(owner, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    for wide, narrow in (("in_features", "out_features"), ("input_size", "output_size")):
        sizes = (getattr(owner, wide, None), getattr(owner, narrow, None))
        if None not in sizes:
            return sizes == shape[1:] and sizes[0] != sizes[1]
    hidden = getattr(owner, "hidden_size", getattr(owner, "hidden_dim", None))
    if hidden is None or shape[1] == shape[2]:
        return False
    return shape[2] == hidden if "down" in leaf else shape[1] == hidden


# What a tensor is that is kept for a reason of one word, for people; other reasons are sentences already.
_KEPT_WORDS = {"scalar": "single numbers", "buffer": "buffers", "convolution": "convolutions"}
_NORM = re.compile(r"norm|(^|[._])ln(_|\d|[._]|$)|layernorm", re.IGNORECASE)


def kept_words(name: str, keep: str) -> str:
    """Why a tensor stays as it is, for people: what it is called says whether a vector is of a norm or a bias."""
    if keep != "vector":
        return _KEPT_WORDS.get(keep, keep)
    if name.endswith("bias") or "bias_" in name.rpartition(".")[2]:
        return "biases"
    return "norms" if _NORM.search(name) else "vectors"
