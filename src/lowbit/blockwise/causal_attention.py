"""Causal attention for calibration: PyTorch's own multiplies in float32 on a CPU, and so takes twice as long."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.kernels.bfloat16 import causal_attention, multiplies_bfloat16
from lowbit.solvers.products import bfloat16_products

_WIDEST = 512  # head that the C++ part takes
_QUERIES = 256  # rows that are scored at once, against the keys up to the last of them
_SCORES = 1 << 20  # float32 scores that are in memory at a time


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(scale Q K' + causal mask) V, for Q, K, V [batch, heads, tokens, width]: bfloat16 operands, float32 sums
    and softmax, as in the kernel that it stands for. `F.scaled_dot_product_attention` where the call asks for more."""
    plain = attn_mask is None and dropout_p == 0.0 and is_causal and query.dim() == 4
    square = plain and key.shape == value.shape and query.shape[-2:] == key.shape[-2:]
    if not square or not torch.is_autocast_enabled("cpu") or torch.is_grad_enabled():
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    with torch.autocast("cpu", enabled=False), bfloat16_products():
        q, k, v = (t.to(torch.bfloat16) for t in (query, key, value))
        if multiplies_bfloat16() and q.shape[-1] % 2 == 0 and q.shape[-1] <= _WIDEST:
            return causal_attention(q, k, v, scale or q.shape[-1] ** -0.5)
        shared = q.shape[1] // k.shape[1]  # queries that read the same keys
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        out = _attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale or q.shape[-1] ** -0.5)
    return out.unflatten(0, query.shape[:2])


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[heads, tokens, width], bfloat16."""
    heads, tokens, _ = query.shape
    out = torch.empty_like(query)
    q, k = query.float(), key.float()  # the type of a product is that of its operands, and scores are to be float32
    future = torch.full((_QUERIES, _QUERIES), -torch.inf).triu_(1)
    rounds = -(-heads // max(1, _SCORES // (min(_QUERIES, tokens) * tokens)))
    together = -(-heads // rounds)
    for first in range(0, heads, together):
        part = slice(first, first + together)
        for begin in range(0, tokens, _QUERIES):
            end = min(begin + _QUERIES, tokens)
            scores = torch.bmm(q[part, begin:end], k[part, :end].transpose(1, 2)).mul_(scale)
            scores[..., begin:end] += future[: end - begin, : end - begin]
            torch.softmax(scores, -1, out=scores)
            out[part, begin:end] = torch.bmm(scores.to(torch.bfloat16), value[part, :end])
    return out
