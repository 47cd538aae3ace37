"""What calibration computes in bfloat16 by the C++ part, on processors that multiply pairs of bfloat16 numbers (AVX-512 BF16):
PyTorch rounds such products to bfloat16, or computes them at the speed of float32. Where it has units for matrices (AMX), it is
faster, and these functions are not used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.kernels.core import core
from lowbit.kernels.thread_pool import pool


def multiplies_bfloat16() -> bool:
    """Whether the functions of this file work here."""
    module: Any = core()
    return module is not None and bool(module.multiplies_bfloat16())


def add_moments(
    x: Tensor, products: Tensor, largest: Tensor, sizes: Tensor, y: Tensor | None = None, drift: Tensor | None = None
) -> None:
    """Add x' x to the upper triangle of `products` [K, K], (y - x)' x to `drift` [K, K] and |x| to `sizes` [K], and take the
    largest |x| into `largest` [K].

    x, y [tokens, K], in float32 or bfloat16; x, and y less the rounded x, are rounded to bfloat16. The sums, float32, are
    changed in place and are the same for any number of threads. What lies below the diagonal of `products` means nothing.
    """
    module: Any = core()
    module.add_moments(
        pool(), _rows(x), products.numpy(), largest.numpy(), sizes.numpy(), None if y is None else _rows(y),
        None if drift is None else drift.numpy(),
    )  # fmt: skip


def _rows(x: Tensor) -> Any:
    if x.dtype != torch.bfloat16:
        return x.to(torch.float32).contiguous().numpy()
    return x.contiguous().view(torch.uint16).numpy()


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale Q K' + causal mask) V, bfloat16 [windows, heads, tokens, width]; K and V may have fewer heads, which divide
    those of Q. Scores, softmax and sums are float32; probabilities are rounded to bfloat16. The width is even, at most 512."""
    module: Any = core()
    out = torch.empty(query.shape, dtype=torch.bfloat16)
    q, k, v, y = (t.contiguous().view(torch.uint16).numpy() for t in (query, key, value, out))
    module.causal_attention(pool(), q, k, v, scale, y)
    return out
