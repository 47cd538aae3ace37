"""The KV cache as a format: how keys and values are stored, and what reading them back gives."""

from lowbit.kv.cache_format import CacheFormat
from lowbit.kv.calibrating import calibrate
from lowbit.kv.round_trip import round_trip
from lowbit.kv.side import CacheSide
from lowbit.kv.tables import Tables, tables_from_tensors, tables_to_tensors

__all__ = [
    "CacheFormat", "CacheSide", "Tables", "calibrate", "round_trip", "tables_from_tensors", "tables_to_tensors",
]  # fmt: skip
