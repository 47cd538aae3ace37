"""Weights that stand in the type in which they are stored, and are widened to float32 where they are used, some rows at a time.

A model in bfloat16 computes in float32 with half the memory for its weights. As far as its code can see it is a model in float32:
whoever asks a weight for its type is told so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lowbit.planning.measuring import SLICE

NARROW = (torch.bfloat16, torch.float16)
_TYPE = Tensor.dtype.__get__  # type: ignore[attr-defined]
_LOOKUPS: tuple[Any, ...] = (F.embedding, torch.embedding)
_VIEWS: tuple[Any, ...] = (
    Tensor.__getitem__, Tensor.t, torch.t, Tensor.transpose, torch.transpose, Tensor.view, Tensor.reshape, Tensor.permute,
    Tensor.unbind, torch.unbind, Tensor.chunk, torch.chunk, Tensor.split, torch.split, Tensor.size, Tensor.dim, Tensor.numel,
    Tensor.stride, Tensor.contiguous, Tensor.detach, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__,
)  # fmt: skip


class Widening(TorchFunctionMode):
    """Entered around a forward: what is computed with the `weights` of 16 bits among these, or with views of them, is computed in float32.

    Others of 16 bits, such as the scales of packed weights, are left alone.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {w.untyped_storage().data_ptr() for w in weights if not w.is_meta and w.dtype in NARROW}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._known or not any(map(self._is_narrow, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        if func == _TYPE:
            return torch.float32
        if func in _VIEWS or getattr(func, "__name__", "") == "__get__":
            return self._of_view(func(*args, **kwargs))
        if func in _LOOKUPS:
            return func(*args, **kwargs).float()
        if func is F.linear and self._is_matrix(args[1] if len(args) > 1 else kwargs.get("weight")):
            return _linear(*args, **kwargs)
        return func(*map(self._wide, args), **{name: self._wide(value) for name, value in kwargs.items()})

    def _is_narrow(self, value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return any(map(self._is_narrow, value))
        return (
            isinstance(value, Tensor)
            and value.dtype in NARROW
            and not value.is_meta
            and value.untyped_storage().data_ptr() in self._known
        )

    def _is_matrix(self, value: Any) -> bool:
        return self._is_narrow(value) and value.dim() == 2

    def _wide(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(map(self._wide, value))
        return value.float() if self._is_narrow(value) else value

    def _of_view(self, value: Any) -> Any:
        """What a view gave: rows that were copied out of a weight are wide from here on."""
        if isinstance(value, Tensor) and value.dtype in NARROW and not self._is_narrow(value):
            return value.float()
        return value


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with a weight [out, in] of 16 bits, SLICE of its elements at a time. The names are PyTorch's."""
    rows, cols = weight.shape
    step = max(1, SLICE // max(1, cols))
    if rows <= step:
        return F.linear(input, weight.float(), bias)
    out = input.new_empty((input.numel() // cols, rows))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        out[:, part] = F.linear(input.reshape(-1, cols), weight[part].float(), None if bias is None else bias[part])
    return out.view(*input.shape[:-1], rows)
