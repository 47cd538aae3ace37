"""Adapters beside the weights of a model that runs: low-rank products that are added to the outputs of its layers, several by name."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.adapters.adapter import Adapter
from lowbit.adapters.changes import CHUNK, changes_of, factors
from lowbit.errors import RecipeError, nearest
from lowbit.interchange.hf.models import meta_model
from lowbit.interchange.hf.section import as_float
from lowbit.interchange.inventory import inventory_of
from lowbit.nn.swap import owner_of


@dataclass
class _Product:
    """What is added to the output of one layer: left [out, r] and right [r, in]; of an embedding left [count, r] and right [r, width].

    lengths: of DoRA, [out]: what the rows of the sum are multiplied with. bias: [out].
    """

    left: Tensor
    right: Tensor
    embedding: bool
    lengths: Tensor | None = None
    bias: Tensor | None = None

    def added(self, module: Any, x: Tensor, y: Tensor) -> Tensor:
        """The output of the layer with the adapter, from the one without."""
        left, right = self.left.to(y), self.right.to(y)
        if self.embedding:  # some families scale what they look up
            return y + F.embedding(x, left) @ right * getattr(module, "embed_scale", 1.0)
        more = F.linear(F.linear(x.to(y.dtype), right), left)
        if self.lengths is not None:
            own = getattr(module, "bias", None)
            y = (y if own is None else y - own) + more
            y = y * self.lengths.to(y)
            return y if own is None else y + own
        return y + more if self.bias is None else y + more + self.bias.to(y)


@dataclass
class _Loaded:
    """An adapter as a model uses it: products by module, and tensors that take the place of others, by name."""

    products: dict[str, _Product] = field(default_factory=dict)
    replaced: dict[str, nn.Parameter] = field(default_factory=dict)


class Beside:
    """Adapters of a transformers model, float or packed, of which one is in use at a time, or none.

    What the model computes is what peft computes with the same adapter, y = x W' + s x A' B' (Hu et al. 2021), or that times m / |W + s B A| with DoRA (Liu et al. 2024,
    eq. 5), whatever W is stored in. The weights stay as they are. SourceError for an adapter that does not fit the model.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, Adapter], label: str) -> None:
        self._model = model
        self._loaded = {name: _load(model, adapter, label) for name, adapter in adapters.items()}
        self._used: str | None = None
        self._own: list[tuple[nn.Module, str, Any]] = []
        modules = {module for loaded in self._loaded.values() for module in loaded.products}
        self._hooks = [
            model.get_submodule(name).register_forward_hook(partial(self._after, name)) for name in sorted(modules)
        ]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they were given."""
        return tuple(self._loaded)

    @property
    def used(self) -> str | None:
        """The name of the adapter in use."""
        return self._used

    def use(self, name: str | None) -> None:
        """Let the model compute with this adapter, or with none. RecipeError for a name that there is not."""
        if name is not None and name not in self._loaded:
            raise RecipeError(
                f"there is no adapter {name!r}{nearest(name, self._loaded)}; there are {', '.join(self._loaded)}"
            )
        for owner, last, before in self._own:
            _put(owner, last, before)
        self._own, self._used = [], name
        for place, value in self._loaded[name].replaced.items() if name is not None else ():
            owner, last = owner_of(self._model, place)
            self._own.append((owner, last, owner._modules.get(last, owner._parameters.get(last))))
            _put(owner, last, value)

    def remove(self) -> None:
        """Leave the model as it was."""
        self.use(None)
        for hook in self._hooks:
            hook.remove()

    def _after(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        product = None if self._used is None else self._loaded[self._used].products.get(name)
        return output if product is None else product.added(module, inputs[0], output)


def _put(owner: nn.Module, last: str, value: Any) -> None:
    owner._parameters.pop(last, None)
    owner._modules.pop(last, None)
    (owner._parameters if isinstance(value, nn.Parameter) else owner._modules)[last] = value


def _load(model: nn.Module, adapter: Adapter, label: str) -> _Loaded:
    """The values of an adapter in float32, by the names of the model's modules."""
    shape = meta_model(as_float(copy.deepcopy(model.config)))
    inventory = inventory_of(shape)
    changes = changes_of(adapter, inventory.params, inventory.tied, shape.base_model_prefix, label)
    loaded = _Loaded()
    for name, change in changes.items():
        owner, last = owner_of(model, name)
        if change.replaced is not None:
            before: Any = owner._modules.get(last, owner._parameters.get(last))
            value = adapter.value(change.replaced).to(before.device, before.dtype)
            loaded.replaced[name] = nn.Parameter(value, requires_grad=False)
        if change.product is None:
            continue
        left, right = factors(adapter, change.product)
        lengths = bias = None
        if change.product.magnitude is not None:
            weight = loaded.replaced.get(name, getattr(owner, last))
            transposed = inventory.params[name].transposed
            lengths = adapter.value(change.product.magnitude) / _row_lengths(weight, left, right, transposed)
        if change.product.bias is not None:
            bias = (change.product.scaling * adapter.value(change.product.bias)).float()
        loaded.products[name.removesuffix(f".{last}")] = _Product(
            left.float(), right.float(), change.product.embedding, None if lengths is None else lengths.float(), bias
        )
    return loaded


def _row_lengths(weight: Any, left: Tensor, right: Tensor, transposed: bool) -> Tensor:
    """|W + left right| of each row [in], float64 [out]."""
    dense = weight.dequantize(torch.float32) if hasattr(weight, "qtensor") else weight.detach()
    rows = dense.mT if transposed else dense
    step = max(1, CHUNK // max(1, rows.shape[1]))
    parts = [rows[at : at + step].double() + left[at : at + step] @ right for at in range(0, len(rows), step)]
    return torch.cat([torch.linalg.vector_norm(part, dim=1) for part in parts])
