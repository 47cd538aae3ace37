"""Which row of a producer makes channel c of its consumer's input.

With d the head size and H query heads, channel c belongs to head c // d. With fewer key-value heads (grouped
queries) H / KV neighbouring query heads read the same value head, so several channels have the same row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.errors import TransformError

LAYOUTS: dict[str, Callable[[int, int, int], Tensor]] = {}


def is_values(name: str) -> bool:
    """Whether a layout is that of the values of an attention, in heads."""
    return name in ("values", "stacked", "interleaved")


def layout(name: str) -> Callable[[Callable[[int, int, int], Tensor]], Callable[[int, int, int], Tensor]]:
    """Register a layout: (rows of the producer, channels of the consumer, query heads) -> int64 [channels]."""

    def register(function: Callable[[int, int, int], Tensor]) -> Callable[[int, int, int], Tensor]:
        LAYOUTS[name] = function
        return function

    return register


@layout("same")
def _same(rows: int, channels: int, heads: int) -> Tensor:
    """Row c: an MLP."""
    _require(rows == channels, rows, channels)
    return torch.arange(channels)


@layout("second-half")
def _second_half(rows: int, channels: int, heads: int) -> Tensor:
    """[gate; up] in one matrix."""
    _require(rows == 2 * channels, rows, channels)
    return torch.arange(channels) + channels


@layout("values")
def _values(rows: int, channels: int, heads: int) -> Tensor:
    """A value projection of its own, [KV * d, K]."""
    return _value_rows(rows, channels, heads)


@layout("stacked")
def _stacked(rows: int, channels: int, heads: int) -> Tensor:
    """[all queries; all keys; all values] in one matrix, [(H + 2 KV) * d, K]."""
    own = (rows - channels) // 2
    return _value_rows(own, channels, heads) + (rows - own)


@layout("interleaved")
def _interleaved(rows: int, channels: int, heads: int) -> Tensor:
    """Query, key and value of each head next to each other, [H * 3 * d, K]."""
    _require(rows == 3 * channels and channels % heads == 0, rows, channels)
    d, c = channels // heads, torch.arange(channels)
    return c // d * 3 * d + 2 * d + c % d


def _value_rows(rows: int, channels: int, heads: int) -> Tensor:
    d = channels // heads
    _require(d > 0 and channels % heads == 0 and rows % d == 0 and rows > 0, rows, channels)
    shared = rows // d  # key-value heads
    _require(heads % shared == 0, rows, channels)
    c = torch.arange(channels)
    return c // d // (heads // shared) * d + c % d


def _require(fits: bool, rows: int, channels: int) -> None:
    if not fits:
        raise TransformError(f"{rows} rows cannot make {channels} channels in this way")
