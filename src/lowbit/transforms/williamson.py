"""Hadamard matrices from four symmetric circulants A, B, C, D of +-1 with A^2 + B^2 + C^2 + D^2 = 4m I.

Their eigenvalues are the discrete Fourier transforms of their first rows, so the condition is that the four power
spectra add up to 4m at every frequency. The search pairs up spectra; it looks only at rows that a group of
multipliers of order 3 (or 1) leaves unchanged, which keeps it short where it finds anything.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import torch
from torch import Tensor

_MOST_ORBITS = 7  # 2^7 rows, 2^14 pairs: a moment

# Williamson's pattern of quaternions, and Baumert and Hall's of order 12 ("A new construction for Hadamard matrices",
# Bulletin of the AMS 71, 1965). A capital is a circulant, a small letter its negative.
_WILLIAMSON = ("ABCD", "bAdC", "cDAb", "dcBA")
_BAUMERT_HALL = (
    "AAABbCcdBCdd", "AaBabdDcbdcc", "AbaAdDbBcdCc", "BAaaDDDCCbbc", "BdDDAAACcBcB", "BCdDAaCadCBb",
    "DcBbAcaABCDd", "cdcdCAaadBbb", "DcbbbCCdAAAD", "dbCCCBBdAaDa", "CbcCDbdbAdaA", "cddCcbBBDAaa",
)  # fmt: skip


def williamson(order: int) -> Tensor | None:
    """A Hadamard matrix of order 4m for odd m, float64, or None where the search finds no four circulants."""
    return _filled(_WILLIAMSON, order)


def baumert_hall(order: int) -> Tensor | None:
    """A Hadamard matrix of order 12m for odd m, float64, or None where the search finds no four circulants."""
    return _filled(_BAUMERT_HALL, order)


def _filled(pattern: tuple[str, ...], order: int) -> Tensor | None:
    side = len(pattern)
    m = order // side
    rows = circulants(m) if order % side == 0 and m % 2 else None
    if rows is None:
        return None
    i = torch.arange(m)
    blocks = {}
    for letter, row in zip("ABCD", rows):
        blocks[letter] = row[(i[:, None] - i[None, :]) % m]
        blocks[letter.lower()] = -blocks[letter]
    return torch.cat([torch.cat([blocks[letter] for letter in line], dim=1) for line in pattern])


@lru_cache(maxsize=32)
def circulants(m: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """First rows, float64 [m] each, of four symmetric circulants that satisfy the condition, or None."""
    multipliers = [a for a in range(1, m + 1) if gcd(a, m) == 1 and pow(a, 3, m) == 1 % m]
    for a in sorted(multipliers, reverse=True):
        orbits = _orbits(m, {pow(a, e, m) for e in range(3)})
        if len(orbits) <= _MOST_ORBITS:
            found = _search(m, orbits)
            if found is not None:
                return found
    return None


def _orbits(m: int, group: set[int]) -> list[list[int]]:
    """The places 1..m-1 of a row, in sets that a symmetric row invariant under the group fills alike."""
    seen: set[int] = set()
    orbits = []
    for j in range(1, m):
        if j not in seen:
            orbit = {sign * j * g % m for g in group for sign in (1, -1)}
            seen |= orbit
            orbits.append(sorted(orbit))
    return orbits


def _search(m: int, orbits: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    count = 1 << len(orbits)
    rows = torch.ones(count, m, dtype=torch.float64)
    for bit, orbit in enumerate(orbits):
        rows[:, orbit] = ((torch.arange(count) >> bit & 1) * 2.0 - 1).double()[:, None]
    power = torch.fft.fft(rows).real.square()[:, [0, *(orbit[0] for orbit in orbits)]]
    low = [i for i in range(count) if float(power[i].max()) <= 4 * m + 1e-6]
    pairs = [(i, j) for n, i in enumerate(low) for j in low[n:]]
    sums = {_key(power[i] + power[j]): (i, j) for i, j in pairs}
    for i, j in pairs:
        other = sums.get(_key(4 * m - power[i] - power[j]))
        if other is not None:
            return rows[i], rows[j], rows[other[0]], rows[other[1]]
    return None


def _key(spectrum: Tensor) -> tuple[int, ...]:
    """Equal for spectra that agree to 1e-3; different ones of such short rows are further apart, and a test multiplies out."""
    return tuple(int(v) for v in (spectrum * 1e3).round())
