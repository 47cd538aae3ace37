"""What an adapter does to each tensor of one model: names and shapes matched before a value is read, then the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.adapters.adapter import Adapter, LowRank
from lowbit.errors import SourceError, nearest
from lowbit.interchange.files.safetensors_reader import Entry
from lowbit.interchange.inventory import Param

CHUNK = 1 << 20  # elements that are in float64 at a time


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor: first `replaced` takes its place, then `product` or `added` comes to it.

    added: a vector of the adapter and the number that it is multiplied with, for a bias.
    """

    replaced: Entry | None = None
    product: LowRank | None = None
    added: tuple[Entry, float] | None = None


def changes_of(
    adapter: Adapter, params: Mapping[str, Param], tied: Mapping[str, str], prefix: str, label: str
) -> dict[str, Change]:
    """By the model's name of each tensor that changes, which may be one that is tied to another.

    params, tied: of the model's inventory. prefix: what a model with a head puts before the names of the model without. SourceError
    where the adapter changes what the model has not, or has in another shape.
    """
    names = {**params, **{alias: params[name] for alias, name in tied.items()}}
    found: dict[str, Change] = {}

    def place(name: str) -> str:
        for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if candidate in names:
                return candidate
        base = f", which was trained on {adapter.config.base!r:.100}" if adapter.config.base else ""
        raise SourceError(
            f"the adapter {adapter.label} changes {name!r}, and {label} has no such tensor{nearest(name, names)}; give the base model of the "
            f"adapter{base}"
        )

    for name, entry in adapter.replaced.items():
        where = place(name)
        _fits(adapter, entry, entry.shape, names[where].shape, where, label)
        if where in found:
            raise SourceError(f"the adapter {adapter.label} changes {where!r} under two names; save the adapter again")
        found[where] = Change(replaced=entry)
    for module, product in adapter.products.items():
        where = place(f"{module}.weight")
        param = names[where]
        if param.kind == "experts" or len(param.shape) != 2 or param.keep in ("convolution", "buffer"):
            raise SourceError(
                f"the adapter {adapter.label} changes {where!r}, which is no matrix; lowbit merges adapters of matrices only"
            )
        if where not in tied and product.embedding != (
            param.kind == "embedding"
        ):  # a head that is tied is in no list of kinds
            is_, are = (
                ("an embedding", "a linear layer") if param.kind == "embedding" else ("no embedding", "an embedding")
            )
            raise SourceError(
                f"{where!r} of {label} is {is_}, and the factors of the adapter {adapter.label} are those of {are}; give its base model"
            )
        rows, cols = (
            (product.a.shape[1], product.b.shape[0]) if product.embedding else (product.b.shape[0], product.a.shape[1])
        )
        shape = (cols, rows) if param.transposed else (rows, cols)
        _fits(adapter, product.b, shape, param.shape, where, label)
        before = found.get(where, Change())
        if before.product is not None:
            raise SourceError(f"the adapter {adapter.label} changes {where!r} under two names; save the adapter again")
        found[where] = Change(before.replaced, product)
        if product.bias is not None:
            beside = f"{where.removesuffix('.weight')}.bias"
            if beside not in names:
                raise SourceError(
                    f"the adapter {adapter.label} was trained with lora_bias=True, and {where.removesuffix('.weight')!r} of {label} has no bias that could "
                    "take it; train without lora_bias"
                )
            _fits(adapter, product.bias, product.bias.shape, names[beside].shape, beside, label)
            found[beside] = Change(found.get(beside, Change()).replaced, added=(product.bias, product.scaling))
    return found


def _fits(
    adapter: Adapter, entry: Entry, shape: tuple[int, ...], wanted: tuple[int, ...], name: str, label: str
) -> None:
    if tuple(shape) != tuple(wanted):
        vocabulary = (
            "; an adapter with a larger vocabulary is merged by peft"
            if len(shape) == 2 and shape[1:] == wanted[1:]
            else ""
        )
        raise SourceError(
            f"{name!r} of {label} has the shape {list(wanted)}, and {entry.name!r} of the adapter {adapter.label} is for {list(shape)}; give the base "
            f"model of the adapter{vocabulary}"
        )


def factors(adapter: Adapter, product: LowRank) -> tuple[Tensor, Tensor]:
    """(left [rows, r], right [r, columns]), float64: their product is added to the weight [out, in], or [count, width] of an embedding."""
    a, b = adapter.value(product.a), adapter.value(product.b)
    return (product.scaling * a.T, b.T) if product.embedding else (product.scaling * b, a)


def merged(adapter: Adapter, change: Change, weight: Tensor, transposed: bool) -> Tensor:
    """The tensor with the adapter in it, in the type and layout of `weight`, contiguous. transposed: it is [in, out], as Conv1D keeps it.

    W' = W + s B A (Hu et al. 2021), or with a magnitude W' = m (W + s B A) / |W + s B A|, where the length is that of each row [in] of
    an output (Liu et al. 2024, eq. 5). Computed in float64 for a few megabytes at a time, and rounded once.
    """
    if change.replaced is not None:
        start = adapter.value(change.replaced)
    elif change.product is None and change.added is None:
        return weight
    else:
        start = weight
    if change.added is not None:
        entry, scaling = change.added
        return (start.double() + scaling * adapter.value(entry)).to(weight.dtype)
    if change.product is None:
        return start.to(weight.dtype).contiguous()
    left, right = factors(adapter, change.product)
    magnitude = None if change.product.magnitude is None else adapter.value(change.product.magnitude)
    rows = start.mT if transposed else start
    done = torch.empty(rows.shape, dtype=weight.dtype)
    step = max(1, CHUNK // max(1, rows.shape[1]))
    for at in range(0, len(rows), step):
        here = slice(at, at + step)
        total = rows[here].double() + left[here] @ right
        if magnitude is not None:
            total *= (magnitude[here] / torch.linalg.vector_norm(total, dim=1))[:, None]
        done[here] = total.to(weight.dtype)
    return (done.mT if transposed else done).contiguous()


def same(adapter: Adapter, one: Change, other: Change) -> bool:
    """Whether two tensors that had the same values have the same ones after these changes, by the values of the adapter alone."""
    if one.added is not None or other.added is not None or (one.replaced is None) != (other.replaced is None):
        return False
    replaced = [adapter.value(each.replaced) for each in (one, other) if each.replaced is not None]
    if len(replaced) == 2 and not torch.equal(*replaced):
        return False
    if one.product is None or other.product is None:
        return one.product is other.product
    if one.product.magnitude is not None or other.product.magnitude is not None:
        return False
    (left, right), (left_2, right_2) = factors(adapter, one.product), factors(adapter, other.product)
    return torch.equal(left, left_2) and torch.equal(right, right_2)
