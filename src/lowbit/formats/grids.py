"""Grids: the real values that codes stand for, on a normalised axis.

A grid answers three questions: which value does a code mean (`decode`), which code is
nearest to a value (`encode`), and how far does the axis reach (`lo`, `hi`). Integer,
floating-point and table grids differ only in that.

Codes are unsigned bytes, `0 <= code < cardinality`. An integer grid counts up from its
lowest level; the floating-point grids use the bit patterns of their standards (OCP FP8,
OCP MX e2m1), so that an exporter only copies them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats.nearest import NearestSearch


class Grid(ABC):
    """Levels on a normalised axis. Values are frozen and compare by content."""

    name: str
    bits: int

    @property
    def cardinality(self) -> int:
        """How many codes there are; codes are packed in base 2**bits unless this is 3 (ternary)."""
        return 1 << self.bits

    @property
    @abstractmethod
    def levels(self) -> Tensor:
        """float32 [cardinality]: the level of each code; NaN where a code means nothing."""

    @property
    @abstractmethod
    def lo(self) -> float:
        """The lowest level."""

    @property
    @abstractmethod
    def hi(self) -> float:
        """The highest level."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Codes (uint8) of the levels nearest to `x` (float32, finite); out of range saturates."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Levels (float32) of `codes` (uint8)."""

    def round(self, x: Tensor) -> Tensor:
        """The level nearest to each `x`, float32: `decode(encode(x))`, without the codes."""
        return self.decode(self.encode(x))

    @property
    def signed(self) -> bool:
        """Whether the axis has negative levels."""
        return self.lo < 0

    @property
    def extreme(self) -> float:
        """The level of the largest magnitude, with its sign; the positive one if both ends are as far."""
        return self.lo if -self.lo > self.hi else self.hi

    @property
    def reach(self) -> float:
        """What the largest magnitude is mapped to when nothing may clip: the highest level.

        A learned table may have next to nothing above zero; then it is the other end.
        """
        return self.hi if 4 * self.hi > -self.lo else -self.lo

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class IntGrid(Grid):
    """Consecutive integers. Ties go to the even integer.

    `is_signed=True`: two's complement range [-2^(b-1), 2^(b-1) - 1], or without its lowest value
    when `narrow` (symmetric around zero, as most hardware wants). `is_signed=False`: [0, 2^b - 1].
    """

    bits: int
    is_signed: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FormatError(f"an integer grid has 1 to 8 bits, not {self.bits}")
        if self.narrow and (not self.is_signed or self.bits < 2):
            raise FormatError(f"'narrow' drops the lowest signed level, which {self.name!r} does not have")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{'int' if self.is_signed else 'uint'}{self.bits}"

    @property
    def cardinality(self) -> int:
        return int(self.hi - self.lo) + 1

    @property
    def lo(self) -> float:
        return float(-(1 << (self.bits - 1)) + self.narrow) if self.is_signed else 0.0

    @property
    def hi(self) -> float:
        return float((1 << (self.bits - self.is_signed)) - 1)

    @property
    def levels(self) -> Tensor:
        return torch.arange(self.lo, self.hi + 1)

    def encode(self, x: Tensor) -> Tensor:
        return x.round().clamp_(self.lo, self.hi).sub_(self.lo).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32).add_(self.lo)

    def round(self, x: Tensor) -> Tensor:
        return x.round().clamp_(self.lo, self.hi)


@dataclass(frozen=True)
class Fp8Grid(Grid):
    """OCP FP8: e4m3 (no infinities, largest 448) or e5m2 (largest finite 57344).

    Ties go to the even mantissa. Out of range saturates at the largest finite value.
    Source: OCP 8-bit Floating Point Specification 1.0, section 5.
    """

    mantissa: int
    bits: int = 8

    def __post_init__(self) -> None:
        if self.mantissa not in (2, 3):
            raise FormatError(f"fp8 has 2 (e5m2) or 3 (e4m3) mantissa bits, not {self.mantissa}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return "e4m3" if self.mantissa == 3 else "e5m2"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.mantissa == 3 else torch.float8_e5m2

    @property
    def hi(self) -> float:
        return 448.0 if self.mantissa == 3 else 57344.0

    @property
    def lo(self) -> float:
        return -self.hi

    @property
    def levels(self) -> Tensor:
        table = self.decode(torch.arange(256, dtype=torch.uint8))
        return torch.where(table.isfinite(), table, math.nan)

    def encode(self, x: Tensor) -> Tensor:
        return x.clamp(self.lo, self.hi).to(self.dtype).view(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.contiguous().view(self.dtype).to(torch.float32)


@dataclass(frozen=True)
class TableGrid(Grid):
    """Any table of 2 to 256 distinct levels, given in the order of their codes.

    Ties go to the even code; for e2m1 that is the even mantissa, as IEEE rounding wants.
    A repeated level (e2m1 has two zeros) is reached through its lowest code.
    """

    name: str
    table: tuple[float, ...]
    bits: int = 0

    def __post_init__(self) -> None:
        if not 2 <= len(self.table) <= 256 or not all(map(math.isfinite, self.table)):
            raise FormatError(f"grid {self.name!r} needs 2 to 256 finite levels, not {len(self.table)}")
        object.__setattr__(self, "bits", max(1, math.ceil(math.log2(len(self.table)))))

    @property
    def cardinality(self) -> int:
        return len(self.table)

    @property
    def lo(self) -> float:
        return min(self.table)

    @property
    def hi(self) -> float:
        return max(self.table)

    @property
    def levels(self) -> Tensor:
        return torch.tensor(self.table)

    def encode(self, x: Tensor) -> Tensor:
        search = _search(self.table, str(x.device))
        return search.codes[search(x)]

    def by_bounds(self) -> tuple[list[float], list[float], list[int]]:
        """Ascending: each level, the largest value that goes to it and not to the next (infinity for the last), its code."""
        search = _search(self.table, "cpu")
        return search.sorted.tolist(), [*search.bounds.tolist(), math.inf], search.codes.tolist()

    def decode(self, codes: Tensor) -> Tensor:
        levels = self.levels.to(codes.device)
        return levels.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)

    def round(self, x: Tensor) -> Tensor:
        search = _search(self.table, str(x.device))
        return search.sorted.index_select(0, search(x).reshape(-1)).view(x.shape)


@lru_cache(maxsize=64)
def _search(table: tuple[float, ...], device: str) -> NearestSearch:
    order = sorted(range(len(table)), key=lambda code: (table[code], code))
    distinct = [c for i, c in enumerate(order) if i == 0 or table[c] != table[order[i - 1]]]
    levels = torch.tensor([table[c] for c in distinct], device=device)
    return NearestSearch(levels, torch.tensor(distinct, dtype=torch.uint8, device=device))


@dataclass(frozen=True)
class CodebookGrid(Grid):
    """Levels learned from the weights themselves; they are stored in the tensor, not here.

    `block` of the codebook (tensor, channel or group) belongs to the format. On the normalised axis a
    learned level is anything; `lo` and `hi` bound it to [-1, 1] for codebooks that come with a scale.
    """

    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FormatError(f"a learned codebook has 1 to 8 bits, not {self.bits}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"kmeans{self.bits}"

    @property
    def lo(self) -> float:
        return -1.0

    @property
    def hi(self) -> float:
        return 1.0

    @property
    def levels(self) -> Tensor:
        raise FormatError(f"the levels of {self.name} are learned and stored in each tensor")

    def encode(self, x: Tensor) -> Tensor:
        raise FormatError(f"{self.name} has no codes before its levels are learned; use the kmeans solver")

    def decode(self, codes: Tensor) -> Tensor:
        raise FormatError(f"{self.name} has no levels of its own; they are stored in each tensor")
