"""The tensors of a GPTQ layer [out, in], as AutoGPTQ and GPTQModel write them.

    qweight  int32 [in * bits / 32, out]      codes, dense along the inputs
    qzeros   int32 [groups, out * bits / 32]  zero-points, dense along the outputs
    scales   float [groups, out]
    g_idx    int32 [in]                       the group of each input; i // group_size unless `desc_act`

    w[o, i] = scales[g_idx[i], o] * (q[i, o] - zero[g_idx[i], o])

`checkpoint_format` "gptq" (version 1) stores each zero-point less one, modulo 2^bits; "gptq_v2" stores it as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.interchange.layouts.words import pack_words, unpack_words


def pack_gptq(codes: Tensor, zeros: Tensor, scales: Tensor, bits: int, *, version: int = 1) -> dict[str, Tensor]:
    """qweight, qzeros and scales of uint8 `codes` [out, in] and `zeros` [out, groups], and float `scales` [out, groups]."""
    kept = (zeros.to(torch.int16) - int(version == 1)).bitwise_and_((1 << bits) - 1).to(torch.uint8)
    return {
        "qweight": pack_words(codes, bits).T.contiguous(),
        "qzeros": pack_words(kept.T, bits),
        "scales": scales.T.contiguous(),
    }


def unpack_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, *, version: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [out, in], zeros uint8 [out, groups], scales [out, groups]). ValueError when sizes do not agree."""
    rows, out = qweight.shape
    if rows * 32 % bits:
        raise ValueError(f"{rows} words hold no whole number of {bits}-bit codes")
    codes = unpack_words(qweight.T, bits, rows * 32 // bits)
    zeros = unpack_words(qzeros, bits, out).T.to(torch.int16) + int(version == 1)
    return codes, zeros.bitwise_and_((1 << bits) - 1).to(torch.uint8).contiguous(), scales.T.contiguous()
