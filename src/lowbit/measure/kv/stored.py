"""What queries read from a cache: which positions exactly, and what of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from lowbit.kv import CacheFormat, CacheSide
from lowbit.kv.cache_format import Which
from lowbit.kv.round_trip import round_trip
from lowbit.kv.tables import Tables, TablesOfLayers

Read = Callable[[Tensor], Tensor]
"""Keys or values [heads, tokens, width] float32 as they are read back when all of them are stored."""


@dataclass(frozen=True)
class StoredSide:
    """The keys or the values of one layer in a cache.

    read: None where nothing is rounded. sinks: the first so many positions are read exactly. first_recent: of the position of a query,
    the first position that it reads exactly for being new; the query's own and one more where there is none.
    """

    read: Read | None = None
    sinks: int = 0
    first_recent: Callable[[int], int] = lambda query: query + 1

    @property
    def alike(self) -> bool:
        """Whether every query reads the same of a position."""
        return self.read is None or (self.sinks == 0 and all(self.first_recent(i) == i + 1 for i in (0, 1, 4095)))


class Cache(Protocol):
    """A way of storing keys and values, whoever's it is."""

    def side(self, layer: int, which: Which) -> StoredSide:
        """The keys (`which` "k") or values ("v") of this layer."""
        ...


@dataclass(frozen=True)
class FormatCache:
    """A cache in a format. tables: what calibration found, by (layer, "k" or "v")."""

    format: CacheFormat
    tables: TablesOfLayers = field(default_factory=dict)

    def side(self, layer: int, which: Which) -> StoredSide:
        """As of `Cache`."""
        return stored_side(self.format.side(layer, which), self.tables.get((layer, which)))


@dataclass(frozen=True)
class OneSide:
    """A cache that is exact but for one side of one layer."""

    layer: int
    which: Which
    stored: StoredSide

    def side(self, layer: int, which: Which) -> StoredSide:
        """As of `Cache`."""
        return self.stored if (layer, which) == (self.layer, self.which) else EXACT


EXACT = StoredSide()


def stored_side(side: CacheSide, tables: Tables | None = None) -> StoredSide:
    """What queries read of a side, by the reference of `lowbit.kv`."""
    if side.exact:
        return EXACT
    return StoredSide(lambda x: round_trip(x, side, tables), side.sinks, side.first_recent)


def exact_cache(_: Any = None) -> Cache:
    """The float cache."""
    return FormatCache(CacheFormat())
