"""One operation, many implementations: y = x W^T + b for a packed W.

A kernel says whether it can serve a weight (`declines` gives the reason when not) and prepacks it once.
The dispatcher times the kernels that accept on this machine, for the number of rows at hand, and keeps
the fastest. The reference kernel accepts everything. Files never depend on a kernel.

Where the inputs are quantized too, a kernel of float inputs multiplies what they round to, which defines what is
right; one that multiplies the integers themselves overrides `linear_of_quantized`.
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
from lowbit.formats import InputQuantizer, Inputs, QTensor


class Kernel(ABC):
    """An implementation of the packed linear layer."""

    name: str
    any_type = False  # whether what `prepack` gives serves activations of every type

    @abstractmethod
    def declines(self, q: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this kernel cannot multiply activations of `dtype` with `q`, or None if it can."""

    @abstractmethod
    def prepack(self, q: QTensor, dtype: torch.dtype, quantizer: InputQuantizer | None = None) -> Any:
        """What the kernel wants to have of the weight, computed once, for inputs that `quantizer` rounds."""

    @abstractmethod
    def linear(self, x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
        """x [rows, in] -> [rows, out], in the type of `x`."""

    def declines_inputs(self, q: QTensor, inputs: Inputs | None) -> str | None:
        """Why this kernel cannot multiply with inputs stored as `inputs` (None: float), or None if it can."""
        return None

    def linear_of_quantized(self, x: Tensor, packed: Any, bias: Tensor | None, quantizer: InputQuantizer) -> Tensor:
        """As `linear`, with `x` quantized on the way."""
        return self.linear(quantizer.round(x), packed, bias)


def all_kernels() -> list[Kernel]:
    """Every kernel of this version, the reference last."""
    from lowbit.kernels.cpu import Packed
    from lowbit.kernels.reference import Expand
    from lowbit.kernels.torch_cpu import TorchInt4, TorchInt8
    from lowbit.kernels.torch_int import TorchInt

    return [Packed(), TorchInt8(), TorchInt4(), TorchInt(), Expand()]


def survey(
    q: QTensor, dtype: torch.dtype, device: torch.device, inputs: Inputs | None = None
) -> list[tuple[Kernel, str | None]]:
    """Every kernel with its reason to decline (None: it accepts)."""
    return [(k, k.declines_inputs(q, inputs) or k.declines(q, dtype, device)) for k in all_kernels()]


def bucket(rows: int) -> int:
    """Row counts that share a measurement: 1, up to 4, up to 32, and more."""
    return next((size for size in (1, 4, 32) if rows <= size), 256)


class Timings:
    """The fastest kernel by (format, shape, type, device, rows, inputs), measured once each."""

    def __init__(self) -> None:
        self.best: dict[tuple[Any, ...], str] = {}

    def choose(
        self, q: QTensor, dtype: torch.dtype, device: torch.device, rows: int, quantizer: InputQuantizer | None = None
    ) -> str:
        """The name of the kernel to use for `rows` rows of activations."""
        inputs = quantizer.inputs if quantizer else None
        key = (q.format, q.shape, dtype, str(device), bucket(rows), torch.get_num_threads(), inputs)
        if key not in self.best:
            accepting = [kernel for kernel, reason in survey(q, dtype, device, inputs) if reason is None]
            if len(accepting) > 1:
                x = torch.zeros(bucket(rows), q.shape[-1], dtype=dtype, device=device)
                seconds: dict[str, float] = {}
                for kernel in reversed(accepting):  # the reference first: it is never the slowest by far
                    seconds[kernel.name] = _measure(kernel, q, x, quantizer, min(seconds.values(), default=_FOREVER))
                self.best[key] = min(seconds, key=lambda name: seconds[name])
            else:
                self.best[key] = accepting[0].name
        return self.best[key]


def _product(kernel: Kernel, x: Tensor, packed: Any, bias: Tensor | None, quantizer: InputQuantizer | None) -> Tensor:
    if quantizer is None:
        return kernel.linear(x, packed, bias)
    return kernel.linear_of_quantized(x, packed, bias, quantizer)


_FOREVER = float("inf")


def _measure(
    kernel: Kernel, q: QTensor, x: Tensor, quantizer: InputQuantizer | None = None, to_beat: float = _FOREVER,
    repeats: int = 3,
) -> float:  # fmt: skip
    """Least seconds of a few calls after one to warm up, which is all when it took 20 times what is to beat."""
    packed = kernel.prepack(q, x.dtype, quantizer)
    best = _FOREVER
    for attempt in range(repeats + 1):
        start = time.perf_counter()
        _product(kernel, x, packed, None, quantizer)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        took = time.perf_counter() - start
        if attempt:
            best = min(best, took)
        elif took > 20 * to_beat:
            return took
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

    def linear(
        self, x: Tensor, weight: Callable[[], QTensor], bias: Tensor | None, quantizer: InputQuantizer | None = None
    ) -> Tensor:
        """x [..., in] -> [..., out]; no rows at all, as of an expert that nobody chose, give none.

        `quantizer`: what becomes of `x` before the product. The same one at every call of a dispatcher.
        """
        count = math.prod(x.shape[:-1])
        if count == 0:
            return x.new_zeros((*x.shape[:-1], weight().shape[0]))
        at = bucket(count), x.dtype
        kernel = self.chosen.get(at)
        if kernel is None:
            q = weight()
            name = self.only or _TIMINGS.choose(q, x.dtype, x.device, count, quantizer)
            inputs = quantizer.inputs if quantizer else None
            kernel = self.chosen[at] = _named(name, q, x.dtype, x.device, inputs)
        key = kernel.name, x.dtype
        if key not in self.packed:
            self.packed[key] = kernel.prepack(weight(), x.dtype, quantizer)
        y = _product(kernel, x.reshape(count, x.shape[-1]), self.packed[key], bias, quantizer)
        return y.view(*x.shape[:-1], -1)


def _named(name: str, q: QTensor, dtype: torch.dtype, device: torch.device, inputs: Inputs | None = None) -> Kernel:
    """The kernel `name`. RecipeError when there is none or it cannot serve the weight."""
    known = {kernel.name: (kernel, reason) for kernel, reason in survey(q, dtype, device, inputs)}
    if name not in known:
        raise RecipeError(f"unknown kernel {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    kernel, reason = known[name]
    if reason is not None:
        raise RecipeError(f"kernel {name!r} cannot multiply with a {q.format} weight of shape {q.shape}: {reason}")
    return kernel
