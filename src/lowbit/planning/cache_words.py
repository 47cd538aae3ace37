"""What a card and `inspect` say of the KV cache of a folder: its format, and its bytes per token and at the model's longest context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowbit.kv import CacheFormat
from lowbit.planning.kv_cache import KVCache, kv_cache, longest_context

USUAL = 4096  # tokens, where a model names no longest context


@dataclass(frozen=True)
class CacheFacts:
    """format: its text. per_token: bytes that one more token takes. context: tokens at which the cache of one sequence takes `bytes`, and
    with 16 bits a number `exact`."""

    format: str
    per_token: int
    context: int
    bytes: int
    exact: int


def cache_facts(kv: KVCache, config: Any) -> CacheFacts | None:
    """Of the cache of a model with this config of transformers; None where nothing says how it is stored."""
    if kv.format is None or not kv.layers:
        return None
    context = longest_context(config) or USUAL
    exact = kv.stored(None).bytes_at(context)
    return CacheFacts(str(kv.format), kv.bytes_per_token, context, kv.bytes_at(context), exact)


def facts_of_folder(config: Any, cache: CacheFormat | None) -> CacheFacts | None:
    """The same of the model of a folder that carries this format."""
    return None if cache is None or config is None else cache_facts(kv_cache(config).stored(cache), config)
