"""Attention over a stored cache for all positions at once, equal to decoding token by token.

A query at position i reads position j exactly where j < sinks or j >= first_recent(i), and as it is stored elsewhere. So for each
pair (i, j) one of two keys counts, and one of two values:

    s_ij = q_i k_j' n  or  q_i k^_j' n,     o_i = sum_j p_ij v_j  or  p_ij v^_j,     p = softmax of s over j <= i

What is stored of a position depends on nothing that comes after the scales that it shares, and a group of tokens is read as stored only
when it is complete, so one round trip of the whole sequence serves every query. Two products are needed only for the few columns
where queries of a chunk differ: the newest and the sinks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from lowbit.errors import SourceError
from lowbit.measure.kv.stored import Cache, StoredSide

_NAME = "lowbit-stored-cache"
_SCORES = 1 << 21  # numbers of a chunk of scores at most: they stay near the processor
Seen = Callable[[int, Tensor, Tensor, Tensor, Callable[[StoredSide, StoredSide], Tensor]], None]


class Unreadable(SourceError):
    """The model's attention has parts that this one does not know."""


@contextmanager
def attending(model: nn.Module, cache: Cache, seen: Seen | None = None) -> Iterator[set[int]]:
    """Within, the layers of a decoder of transformers attend to what `cache` gives; yields the numbers of layers that did.

    Sequences go one at a time, from their first token and without a cache of their own. seen: called in each layer with its
    number, queries [heads, tokens, width], keys and values [kv heads, tokens, width], and what gives the outputs
    [heads, tokens, width] for other sides. Raises Unreadable within for attention with parts that are not known here.
    """
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if before is None or not hasattr(model, "set_attn_implementation"):
        raise Unreadable(f"{type(model).__name__} is no model whose attention can be chosen")
    layers: set[int] = set()

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
            raise Unreadable(f"{type(module).__name__} does not attend to one sequence from its beginning")
        _check(module, options)
        layers.add(layer)
        sides = cache.side(layer, "k"), cache.side(layer, "v")
        how = _How(options.get("scaling"), options.get("softcap"), attention_mask)

        def outputs(keys: StoredSide, values: StoredSide) -> Tensor:
            return attend(query[0], key[0], value[0], keys, values, how)

        if seen is not None:
            seen(layer, query[0], key[0], value[0], outputs)
        return outputs(*sides).transpose(0, 1)[None], None

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation(_NAME)  # type: ignore[operator]
    try:
        yield layers
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


def _check(module: nn.Module, options: dict[str, Any]) -> None:
    for name in ("s_aux", "position_bias", "head_mask"):
        if options.get(name) is not None:
            raise Unreadable(f"{type(module).__name__} attends with {name}")
    if options.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise Unreadable(f"{type(module).__name__} attends to what comes later")


class _How:
    """scale of scores (None: 1/sqrt(width)), softcap, and a mask [1, 1, tokens, tokens], bool or added; None for causal."""

    def __init__(self, scale: float | None = None, softcap: float | None = None, mask: Tensor | None = None) -> None:
        self.scale, self.softcap, self.mask = scale, softcap, mask


CAUSAL = _How()


def attend(
    query: Tensor, key: Tensor, value: Tensor, keys: StoredSide, values: StoredSide, how: _How = CAUSAL
) -> Tensor:  # fmt: skip
    """query [heads, tokens, width], key and value [kv heads, tokens, width] -> outputs [heads, tokens, width of values]."""
    stored_k = key if keys.read is None else keys.read(key.float()).to(key.dtype)
    stored_v = value if values.read is None else values.read(value.float()).to(value.dtype)
    if keys.alike and values.alike and how.softcap is None:
        group = query.shape[0] // key.shape[0]
        grown_k, grown_v = (x.repeat_interleave(group, 0)[None] for x in (stored_k, stored_v))
        mask = None if how.mask is None else how.mask[..., : key.shape[1]]
        return torch.nn.functional.scaled_dot_product_attention(
            query[None], grown_k, grown_v, attn_mask=mask, is_causal=mask is None, scale=how.scale
        )[0]
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    rows = max(16, min(512, _SCORES // (query.shape[0] * query.shape[1])))
    for start in range(0, query.shape[1], rows):
        chunk = slice(start, min(start + rows, query.shape[1]))
        out[:, chunk] = _chunk(query, key, value, stored_k, stored_v, keys, values, how, chunk)
    return out


def _chunk(
    query: Tensor, key: Tensor, value: Tensor, stored_k: Tensor, stored_v: Tensor, keys: StoredSide,
    values: StoredSide, how: _How, chunk: slice,
) -> Tensor:  # fmt: skip
    """Outputs [heads, tokens of the chunk, width]."""
    heads, kv, end = query.shape[0], key.shape[0], chunk.stop
    count = end - chunk.start
    q = query[:, chunk].reshape(kv, heads // kv * count, -1)  # the queries of a group see the same keys
    scores = (q @ stored_k[:, :end].mT).view(kv, -1, count, end)
    for columns, exact in _exact(keys, chunk):
        better = (q @ key[:, columns].mT).view(kv, -1, count, columns.stop - columns.start)
        part = scores[..., columns]
        part.copy_(better if exact is None else torch.where(exact.to(part.device), better, part))
    scores *= query.shape[-1] ** -0.5 if how.scale is None else how.scale
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    if how.mask is None:
        ahead = torch.arange(end, device=q.device) > torch.arange(chunk.start, end, device=q.device)[:, None]
        scores.masked_fill_(ahead, -torch.inf)
    elif how.mask.dtype == torch.bool:
        scores.masked_fill_(~how.mask[0, :, None, chunk, :end], -torch.inf)
    else:
        scores += how.mask[0, :, None, chunk, :end]
    p = scores.softmax(-1)
    out = p.view(kv, -1, end) @ stored_v[:, :end]
    for columns, exact in _exact(values, chunk):
        weight = p[..., columns] if exact is None else p[..., columns] * exact.to(p.device)
        out += weight.reshape(kv, -1, columns.stop - columns.start) @ (value - stored_v)[:, columns]
    return out.view(heads, count, -1)


def _exact(side: StoredSide, chunk: slice) -> Iterator[tuple[slice, Tensor | None]]:
    """Columns that queries of the chunk read exactly, and which of them do: bool [queries, columns], None for all."""
    if side.read is None:
        return
    sinks = min(side.sinks, chunk.stop)
    if sinks:
        yield slice(0, sinks), None
    first = torch.tensor([side.first_recent(i) for i in range(chunk.start, chunk.stop)])
    begin = max(sinks, int(first.min()))
    if begin < chunk.stop and bool((first <= torch.arange(chunk.start, chunk.stop)).any()):
        yield slice(begin, chunk.stop), torch.arange(begin, chunk.stop) >= first[:, None]
