"""PackedStates: the keys, or the values, of one layer as a cache holds them: packed, and exactly where the side says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lowbit.kv.side import CacheSide
from lowbit.kv.storing import Parts, Storing, largest_channels
from lowbit.kv.tables import Tables, check_tables

_PER_TOKEN = ("codes", "outliers")  # parts with a row for each token; the others have one for each group


class PackedStates:
    """[batch, heads, tokens, width] by positions `first` to `length`, of which those before `packed` are stored.

    A token is stored once: when it comes, or when its group is complete. Beside what is stored, `tail` has the newest exactly
    (those that are recent for the next query, and those that no group holds yet), and `sinks` the first.
    """

    def __init__(self, side: CacheSide, tables: Tables | None = None, where: str = "the tables") -> None:
        self.side, self.given, self.where = side, tables, where
        self.recording = False  # whether `crop` may take back any of the tokens since the last one
        self.reset()

    def reset(self) -> None:
        """Nothing is stored any more."""
        self.storing: Storing | None = None
        self.parts: Parts = {}
        self.channels: Tensor | None = None
        self.tail: Tensor | None = None
        self.sinks: Tensor | None = None
        self.first = self.packed = self.length = 0

    # Reading and writing

    def append(self, x: Tensor) -> Tensor:
        """Take x [batch, heads, tokens, width], the states of new tokens, and return all of them as these tokens read them.

        Everything is read as the first of the new tokens reads it, but for the new tokens themselves: where the side has
        recent tokens or groups, these are exact.
        """
        query = self.length
        self._take(x)
        found = self.read(query)
        self._trim()
        return found

    def read(self, query: int, start: int = 0) -> Tensor:
        """[batch, heads, length - start, width] as a query at this position reads them, in the type that was given."""
        assert self.tail is not None
        start = max(start, self.first)
        border = min(max(self._first_exact(query), self._tail_start), self.packed)
        stored = self._decoded(start, border)
        newest = self.tail[..., max(start, border) - self._tail_start :, :]
        found = torch.cat([stored, newest], dim=-2) if stored.shape[-2] else newest
        sinks = min(self.side.sinks, self.length) - start
        if sinks > 0 and stored.shape[-2]:
            if self.sinks is not None:
                found[..., : self.sinks.shape[-2] - start, :] = self.sinks[..., start:, :]
            held = max(start, self._tail_start)  # first tokens that are still in the tail
            if held - start < sinks:
                found[..., held - start : sinks, :] = self.tail[..., held - self._tail_start :, :][
                    ..., : sinks - held + start, :
                ]
        return found

    def _take(self, x: Tensor) -> None:
        if self.tail is None:
            self.tail = x[..., :0, :]
            if self.side.format is not None:
                self._begin(x)
        self.tail = torch.cat([self.tail, x], dim=-2)
        self.length += x.shape[-2]
        if self.storing is None:
            return
        end = self.length // self.side.group * self.side.group
        if end > self.packed:
            new = self.tail[..., self.packed - self._tail_start : end - self._tail_start, :]
            parts = self.storing.encode(new.float(), self.channels)
            self.parts = {k: torch.cat([self.parts[k], v], dim=-2) for k, v in parts.items()} if self.parts else parts
            self.packed = end

    def _begin(self, x: Tensor) -> None:
        heads, width = x.shape[1], x.shape[-1]
        tables = Tables() if self.given is None else self.given.to(x.device)
        if self.given is not None:
            check_tables(tables, self.side, heads, width, self.where)
        self.storing = Storing(self.side, width, tables)
        if self.side.outliers:
            chosen = tables.channels
            self.channels = largest_channels(x, self.side) if chosen is None else chosen.expand(len(x), -1, -1)

    def _trim(self) -> None:
        """Leave in the tail what is not stored, and the newest `recent`; move the first tokens to the sinks."""
        if self.recording or self.storing is None or self.tail is None:
            return
        keep = min(self.packed, max(self.length - self.side.recent, self.first))
        if keep <= self._tail_start:
            return
        wanted = self.side.sinks - self._tail_start
        if wanted > 0 and self._tail_start == (0 if self.sinks is None else self.sinks.shape[-2]):
            more = self.tail[..., : min(wanted, keep - self._tail_start), :]
            self.sinks = more.clone() if self.sinks is None else torch.cat([self.sinks, more], dim=-2)
        self.tail = self.tail[..., keep - self._tail_start :, :].clone()

    def _first_exact(self, query: int) -> int:
        """The first position that this query reads exactly for being new."""
        if self.storing is None:
            return 0
        if not self.side.recent and self.side.group == 1:
            return self.length
        return self.side.first_recent(query)

    def _decoded(self, start: int, end: int) -> Tensor:
        """Positions start to end as they are stored."""
        assert self.tail is not None
        if self.storing is None or end <= start:
            return self.tail[..., :0, :]
        at = (start - self.first) // self.side.group * self.side.group  # of the group that start is in
        rows = self._rows(self.parts, at, end - self.first)
        decoded = self.storing.decode(rows, self.channels)[..., start - self.first - at :, :]
        return decoded.to(self.tail.dtype)

    def _rows(self, parts: Mapping[str, Tensor], start: int, end: int) -> Parts:
        """The stored tokens start to end, counted from the first stored; start at the border of a group."""
        group = self.side.group

        def cut(name: str, part: Tensor) -> Tensor:
            rows = slice(start, end) if name in _PER_TOKEN else slice(start // group, -(-end // group))
            return part[..., rows, :]

        return {name: cut(name, part) for name, part in parts.items()}

    @property
    def _tail_start(self) -> int:
        return self.length - (0 if self.tail is None else self.tail.shape[-2])

    # What generation does to a cache

    def crop(self, tokens: int) -> None:
        """Forget the newest `tokens`, and let the others be.

        Tokens whose exact copy is gone by then are read as stored, also those of a group that is no longer complete: it gets
        its scales anew when it is, from what was stored. Under `recording` no exact copy since the last crop is gone.
        """
        tokens = min(tokens, self.length - self.first)
        if tokens > 0 and self.tail is not None:
            length = self.length - tokens
            packed = min(self.packed, length // self.side.group * self.side.group) if self.storing else 0
            start = min(self._tail_start, length)
            tail = self.tail[..., : length - start, :] if start == self._tail_start else self.tail[..., :0, :]
            if packed < start:  # the rest of a group, whose exact copies are gone
                tail = torch.cat([self._decoded(packed, start), tail], dim=-2)
            self.parts = {k: v.clone() for k, v in self._rows(self.parts, 0, packed - self.first).items()}
            self.tail, self.length, self.packed = tail.clone(), length, packed
            if self.sinks is not None:
                self.sinks = self.sinks[..., :length, :].clone()
        self._trim()

    def drop_before(self, position: int) -> None:
        """Forget what stands before this position, as far as whole groups do."""
        if self.tail is None or position <= self.first:
            return
        first = min(position, self.packed) // self.side.group * self.side.group if self.storing else position
        if first > self.first:
            if self.storing is not None:
                rows = self._rows(self.parts, first - self.first, self.packed - self.first)
                self.parts = {k: v.clone() for k, v in rows.items()}
            self.first = first
        if first > self._tail_start:
            self.tail = self.tail[..., first - self._tail_start :, :].clone()
        if self.sinks is not None and first >= self.sinks.shape[-2]:
            self.sinks = None

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply to every tensor, whose first dimension is the batch: choose, repeat, move to a device."""
        self.parts = {name: change(part) for name, part in self.parts.items()}
        for name in ("channels", "tail", "sinks"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, change(value))

    def to(self, device: torch.device | str) -> None:
        """Move everything to a device."""
        self.each(lambda t: t.to(device, non_blocking=True))
        if self.storing is not None:
            self.storing = Storing(self.side, self.storing.width, self.storing.tables.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes that are held: packed parts, and what is kept exactly; not the choice of outlier channels."""
        held = [*self.parts.values(), *(t for t in (self.tail, self.sinks) if t is not None)]
        return sum(t.numel() * t.element_size() for t in held)
