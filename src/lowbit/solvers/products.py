"""Products of float32 matrices whose entries are bfloat16 numbers: exact products, float32 sums, at bfloat16's speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """While this lasts, oneDNN rounds operands of float32 products on the CPU to bfloat16; sums and results are float32.

    PyTorch's bfloat16 products round their results as well. Before PyTorch 2.9 there is no such setting, and products
    are float32.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
