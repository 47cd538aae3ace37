"""absmax, symmetric and the OCP MX rule: the scale from the largest magnitude alone."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats import Format
from lowbit.solvers.in_core import CoreFit
from lowbit.solvers.registry import fit


@fit(offset="never", in_core=lambda fmt: CoreFit("absmax", fmt.grid.reach))
def absmax(x: Tensor, fmt: Format, importance: Tensor | None = None) -> Tensor:
    """Give the largest magnitude of a block the highest level; zero stays zero.

    s = max|x| / hi, hi being 127 for int8.
    Error: at most s/2 per element; nothing clips. int8 keeps -128 unused.
    Source: "Naive Quantization Methods for LLMs" (tutorial); LLM.int8 (Dettmers et al. 2022), section 2.1.
    """
    return x.abs().amax(1) / fmt.grid.reach


@fit(offset="never", in_core=lambda fmt: CoreFit("absmax", (fmt.grid.hi - fmt.grid.lo) / 2))
def symmetric(x: Tensor, fmt: Format, importance: Tensor | None = None) -> Tensor:
    """Spread all levels, the lowest negative one included, over twice the largest magnitude of a block.

    s = 2 max|x| / (hi - lo), which is max|x| / 127.5 for int8.
    Error: at most s/2, except that the largest positive value lies half a step above the highest level and
    is clipped by up to s/2, so that the bound still holds. Source: LLMEasyQuant (Liu et al. 2024), 3.2.2.
    """
    return 2 * x.abs().amax(1) / (fmt.grid.hi - fmt.grid.lo)


@fit(offset="never")
def mx(x: Tensor, fmt: Format, importance: Tensor | None = None) -> Tensor:
    """Take a power of two as the scale of a block, by its largest magnitude, as the OCP MX formats do.

    s = 2^(floor(log2 max|x|) - emax), emax = floor(log2 hi).
    Error: values above the highest level times s (up to 8/6 of it for e2m1) are clipped.
    Source: OCP Microscaling Formats 1.0, section 6.3.
    """
    exponent = torch.frexp(x.abs().amax(1)).exponent - torch.frexp(torch.tensor(fmt.grid.hi)).exponent
    return torch.ldexp(torch.ones_like(x[:, 0]), exponent)
