"""Which kernel multiplies a weight: those that accept are timed on this machine, for the number of rows at hand.

The fastest is kept. The reference kernel accepts everything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import RecipeError, nearest
from lowbit.formats import InputQuantizer, Inputs, QTensor
from lowbit.kernels.cpu import Packed
from lowbit.kernels.kernel import Kernel
from lowbit.kernels.reference import Expand
from lowbit.kernels.torch_cpu import TorchInt4, TorchInt8
from lowbit.kernels.torch_int import TorchInt


def all_kernels() -> list[Kernel]:
    """Every kernel of this version, the reference last."""
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
    """The kernel to use by (format, shape, type, device, rows, threads, inputs), measured once each."""

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
                seconds = _measure(accepting, q, x, quantizer)
                # Kernels round differently, and noise should not decide what a model says: earlier ones have a start.
                within = _START * min(seconds.values())
                self.best[key] = next(k.name for k in accepting if seconds.get(k.name, _FOREVER) <= within)
            else:
                self.best[key] = accepting[0].name
        return self.best[key]


def _product(kernel: Kernel, x: Tensor, packed: Any, bias: Tensor | None, quantizer: InputQuantizer | None) -> Tensor:
    if quantizer is None:
        return kernel.linear(x, packed, bias)
    return kernel.linear_of_quantized(x, packed, bias, quantizer)


_FOREVER = float("inf")
_START = 1.15  # a kernel before another in the list may take this many times as long
_ROUNDS = 5
_BUDGET = 0.1  # seconds that are enough, however few the rounds


def _measure(
    kernels: list[Kernel], q: QTensor, x: Tensor, quantizer: InputQuantizer | None = None
) -> dict[str, float]:  # fmt: skip
    """Least seconds of each kernel over a few rounds in which they take turns, after one call to warm up.

    One whose first call takes 20 times the best so far is called no more. Rounds end when the time for them is spent.
    """
    forms = {k.name: k.prepack(q, x.dtype, quantizer) for k in kernels}
    first: dict[str, float] = {}
    for kernel in kernels:
        first[kernel.name] = _timed(kernel, x, forms[kernel.name], quantizer)
    least = min(first.values())
    best = {name: took for name, took in first.items() if took > 20 * least}
    racing = [k for k in kernels if k.name not in best]
    end = time.perf_counter() + _BUDGET
    for attempt in range(_ROUNDS):
        if attempt and time.perf_counter() > end:
            break
        for kernel in racing:
            took = _timed(kernel, x, forms[kernel.name], quantizer)
            best[kernel.name] = min(best.get(kernel.name, _FOREVER), took)
    return best


def _timed(kernel: Kernel, x: Tensor, packed: Any, quantizer: InputQuantizer | None) -> float:
    start = time.perf_counter()
    _product(kernel, x, packed, None, quantizer)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


# Timings of this process. They only ever decide which of several equal answers is computed sooner.
_TIMINGS = Timings()


class Dispatcher:
    """What one weight remembers: its prepacked forms, by kernel and type. `only`: a kernel to use without asking."""

    def __init__(self, only: str | None = None) -> None:
        self.only = only
        self.packed: dict[tuple[str, torch.dtype | None], Any] = {}
        self.chosen: dict[tuple[int, torch.dtype], tuple[Kernel, Any]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Dispatcher, (self.only,)  # a copy prepacks for itself

    def linear(
        self, x: Tensor, weight: Callable[[], QTensor], bias: Tensor | None, quantizer: InputQuantizer | None = None
    ) -> Tensor:
        """x [..., in] -> [..., out]; no rows at all, as of an expert that nobody chose, give none.

        `quantizer`: what becomes of `x` before the product. The same one at every call of a dispatcher.
        """
        width = x.shape[-1]
        count = x.numel() // width if width else 0
        if count == 0:
            return x.new_zeros((*x.shape[:-1], weight().shape[0]))
        at = bucket(count), x.dtype
        found = self.chosen.get(at)
        if found is None:
            found = self.chosen[at] = self._choose(x, weight(), count, quantizer)
        kernel, packed = found
        y = _product(kernel, x.reshape(count, width), packed, bias, quantizer)
        return y.view(*x.shape[:-1], -1)

    def _choose(self, x: Tensor, q: QTensor, count: int, quantizer: InputQuantizer | None) -> tuple[Kernel, Any]:
        name = self.only or _TIMINGS.choose(q, x.dtype, x.device, count, quantizer)
        kernel = _named(name, q, x.dtype, x.device, quantizer.inputs if quantizer else None)
        key = name, None if kernel.any_type else x.dtype
        if key not in self.packed:
            self.packed[key] = kernel.prepack(q, x.dtype, quantizer)
        return kernel, self.packed[key]


def _named(name: str, q: QTensor, dtype: torch.dtype, device: torch.device, inputs: Inputs | None = None) -> Kernel:
    """The kernel `name`. RecipeError when there is none or it cannot serve the weight."""
    known = {kernel.name: (kernel, reason) for kernel, reason in survey(q, dtype, device, inputs)}
    if name not in known:
        raise RecipeError(f"unknown kernel {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    kernel, reason = known[name]
    if reason is not None:
        raise RecipeError(f"kernel {name!r} cannot multiply with a {q.format} weight of shape {q.shape}: {reason}")
    return kernel
