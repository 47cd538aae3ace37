"""What the words of the seed documents mean here, and how their numbers are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats import QTensor, parse_format
from lowbit.solvers import Call

# method of the documents -> (fit, format)
WORDS = {
    "absmax": ("absmax", "int8:tensor"),
    "zeropoint": ("minmax", "int8:tensor:zero=int32"),
    "minmax": ("minmax", "int8:tensor:zero=fp32"),
    "linear": ("minmax", "uint8:tensor:asym"),
    "blockwise": ("absmax", "int8:*x128"),
    "symmetric": ("symmetric", "int8:tensor"),
    "simquant": ("minmax", "uint8:channel:zero=fp32"),
    "zeroquant": ("minmax", "int8:g128:asym"),
}


def quantize(x: Tensor, word: str) -> QTensor:
    """`x` by a method of the documents."""
    fit, text = WORDS[word]
    return Call("rtn")(x, parse_format(text), Call(fit), None)


def levels(q: QTensor) -> Tensor:
    """The integers that the documents print (their int8 or uint8 values), int32."""
    return q.format.grid.decode(q.unpacked()).to(torch.int32)


def printed(x: Tensor, *digits: float) -> bool:
    """Whether `x` shows these numbers, printed to four decimals."""
    return bool(((x.double().reshape(-1) - torch.tensor(digits, dtype=torch.float64)).abs() < 0.5001e-4).all())
