"""The tensors of an AWQ layer [out, in], as AutoAWQ's "gemm" version writes them: 4 bits, eight outputs to a word.

    qweight  int32 [in, out / 8]       nibble j of word i is the code of output 8 i + ORDER[j]
    qzeros   int32 [groups, out / 8]   in the same order
    scales   float [groups, out]

    w[o, i] = scales[i // group, o] * (q[i, o] - zero[i // group, o])

The order is that of the registers after the fast conversion to fp16 on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.interchange.layouts.words import pack_words, unpack_words

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_awq(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """qweight, qzeros and scales of uint8 `codes` [out, in] and `zeros` [out, groups], and float `scales` [out, groups]."""
    return {"qweight": _interleaved(codes.T), "qzeros": _interleaved(zeros.T), "scales": scales.T.contiguous()}


def unpack_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [out, in], zeros uint8 [out, groups], scales [out, groups])."""
    return _straight(qweight).T.contiguous(), _straight(qzeros).T.contiguous(), scales.T.contiguous()


def _interleaved(codes: Tensor) -> Tensor:
    """uint8 [n, out] -> int32 [n, out / 8]. ValueError when `out` is not a multiple of 8."""
    rows, out = codes.shape
    if out % len(ORDER):
        raise ValueError(f"AWQ packs eight outputs to a word, and {out} are no multiple of 8")
    return pack_words(codes.reshape(rows, -1, 8)[..., list(ORDER)].reshape(rows, out), BITS)


def _straight(words: Tensor) -> Tensor:
    """int32 [n, w] -> uint8 [n, 8 w]."""
    rows, width = words.shape
    back = torch.tensor(ORDER).argsort()
    return unpack_words(words, BITS, 8 * width).view(rows, width, 8)[..., back].reshape(rows, 8 * width)
