"""A KV cache in few bits, measured beside the float cache: what it costs by position, by layer and by side, and what to use."""

from lowbit.measure.kv.check import check_kv, choose_cache
from lowbit.measure.kv.result import CacheCheck

__all__ = ["CacheCheck", "check_kv", "choose_cache"]
