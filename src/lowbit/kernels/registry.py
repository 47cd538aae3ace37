"""One operation, many implementations: y = x W^T + b for a packed W.

A kernel says whether it can serve a weight (`declines` gives the reason when not) and prepacks it once.
The dispatcher times the kernels that accept on this machine, for the number of rows at hand, and keeps
the fastest. The reference kernel accepts everything. Files never depend on a kernel.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import RecipeError, nearest
from lowbit.formats import QTensor


class Kernel(ABC):
    """An implementation of the packed linear layer."""

    name: str

    @abstractmethod
    def declines(self, q: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this kernel cannot multiply activations of `dtype` with `q`, or None if it can."""

    @abstractmethod
    def prepack(self, q: QTensor, dtype: torch.dtype) -> Any:
        """What the kernel wants to have of the weight, computed once."""

    @abstractmethod
    def linear(self, x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
        """x [rows, in] -> [rows, out], in the type of `x`."""


def all_kernels() -> list[Kernel]:
    """Every kernel of this version, the reference last."""
    from lowbit.kernels.reference import Expand
    from lowbit.kernels.torch_cpu import TorchInt4, TorchInt8

    return [TorchInt8(), TorchInt4(), Expand()]


def survey(q: QTensor, dtype: torch.dtype, device: torch.device) -> list[tuple[Kernel, str | None]]:
    """Every kernel with its reason to decline (None: it accepts)."""
    return [(kernel, kernel.declines(q, dtype, device)) for kernel in all_kernels()]


def bucket(rows: int) -> int:
    """Row counts that share a measurement: 1, up to 4, up to 32, and more."""
    return next((size for size in (1, 4, 32) if rows <= size), 256)


class Timings:
    """The fastest kernel by (format, shape, type, device, rows), measured once each."""

    def __init__(self) -> None:
        self.best: dict[tuple[Any, ...], str] = {}

    def choose(self, q: QTensor, dtype: torch.dtype, device: torch.device, rows: int) -> str:
        """The name of the kernel to use for `rows` rows of activations."""
        key = (q.format, q.shape, dtype, str(device), bucket(rows), torch.get_num_threads())
        if key not in self.best:
            accepting = [kernel for kernel, reason in survey(q, dtype, device) if reason is None]
            if len(accepting) > 1:
                x = torch.zeros(bucket(rows), q.shape[-1], dtype=dtype, device=device)
                seconds = {k.name: _measure(k, q, x) for k in accepting}
                self.best[key] = min(seconds, key=lambda name: seconds[name])
            else:
                self.best[key] = accepting[0].name
        return self.best[key]


def _measure(kernel: Kernel, q: QTensor, x: Tensor, repeats: int = 3) -> float:
    """Least seconds of a few calls after one to warm up."""
    packed = kernel.prepack(q, x.dtype)
    best = float("inf")
    for attempt in range(repeats + 1):
        start = time.perf_counter()
        kernel.linear(x, packed, None)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        if attempt:
            best = min(best, time.perf_counter() - start)
    return best


# Timings of this process. They only ever decide which of several equal answers is computed sooner.
_TIMINGS = Timings()


class Dispatcher:
    """What one weight remembers: its prepacked forms, by kernel and type. `only`: a kernel to use without asking."""

    def __init__(self, only: str | None = None) -> None:
        self.only = only
        self.packed: dict[tuple[str, torch.dtype], Any] = {}
        self.chosen: dict[tuple[int, torch.dtype], Kernel] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Dispatcher, (self.only,)  # a copy prepacks for itself

    def linear(self, x: Tensor, weight: Callable[[], QTensor], bias: Tensor | None) -> Tensor:
        """x [..., in] -> [..., out]; no rows at all, as of an expert that nobody chose, give none."""
        count = math.prod(x.shape[:-1])
        if count == 0:
            return x.new_zeros((*x.shape[:-1], weight().shape[0]))
        at = bucket(count), x.dtype
        kernel = self.chosen.get(at)
        if kernel is None:
            q = weight()
            name = self.only or _TIMINGS.choose(q, x.dtype, x.device, count)
            kernel = self.chosen[at] = _named(name, q, x.dtype, x.device)
        key = kernel.name, x.dtype
        if key not in self.packed:
            self.packed[key] = kernel.prepack(weight(), x.dtype)
        return kernel.linear(x.reshape(count, x.shape[-1]), self.packed[key], bias).view(*x.shape[:-1], -1)


def _named(name: str, q: QTensor, dtype: torch.dtype, device: torch.device) -> Kernel:
    """The kernel `name`. RecipeError when there is none or it cannot serve the weight."""
    known = {kernel.name: (kernel, reason) for kernel, reason in survey(q, dtype, device)}
    if name not in known:
        raise RecipeError(f"unknown kernel {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    kernel, reason = known[name]
    if reason is not None:
        raise RecipeError(f"kernel {name!r} cannot multiply with a {q.format} weight of shape {q.shape}: {reason}")
    return kernel
