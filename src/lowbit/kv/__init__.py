"""The KV cache as a format: how keys and values are stored, and what reading them back gives."""

from lowbit.kv.cache_format import CacheFormat
from lowbit.kv.side import CacheSide

__all__ = ["CacheFormat", "CacheSide"]
