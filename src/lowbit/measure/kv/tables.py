"""Tables that calibrated cache formats need, found on text."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lowbit.errors import SourceError
from lowbit.kv import CacheFormat
from lowbit.kv.cache_format import Which
from lowbit.kv.round_trip import Tables
from lowbit.measure.kv.runner import Runner


def tables_of(runner: Runner, fmt: CacheFormat, windows: Tensor) -> Mapping[tuple[int, Which], Tables]:
    """Tables of each side that is calibrated, from the keys and values of windows [count, tokens]."""
    raise SourceError(f"{fmt} is found on text, which is not built yet")
