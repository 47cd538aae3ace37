"""Hadamard matrices, and rotations as data.

A Hadamard matrix has entries +-1 and H H' = n I. Sylvester: H_2n = [[H, H], [H, -H]]. Paley (1933): from the squares
modulo a prime q, of order q + 1 (q = 3 mod 4) or 2 (q + 1) (q = 1 mod 4). Williamson (1944): four symmetric circulants
with A^2 + B^2 + C^2 + D^2 = 4m I in a quaternion pattern give order 4m; Baumert and Hall (1965) put them into a pattern
of order 12, which gives 156. The Kronecker product of two is one, so m * 2^k follows from m.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

import torch
from torch import Tensor

from lowbit.errors import TransformError
from lowbit.transforms.williamson import baumert_hall, williamson

_LARGEST_CORE = 1024


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q [size, size] that a seed determines: x -> x Q on the last dimension of x.

    kind    "hadamard": diag(signs) H / sqrt(n). "mean": keeps the all-ones direction, Q 1 = 1, as LayerNorm needs:
            H diag(signs) H' / n with the sign of the ones column fixed. "random": orthogonal by QR of a Gaussian
            matrix, where no Hadamard matrix of this size is known; "random-mean": the same, and Q 1 = 1
    blocks  Q is block diagonal with this many equal blocks
    """

    size: int
    kind: str = "hadamard"
    seed: int = 0
    blocks: int = 1

    def __post_init__(self) -> None:
        if self.kind not in _KINDS or self.size < 1 or self.blocks < 1 or self.size % self.blocks:
            raise TransformError(
                f"no rotation of size {self.size} in {self.blocks} blocks of kind {self.kind!r}; the size is a multiple "
                f"of the blocks, and the kinds are {', '.join(_KINDS)}"
            )
        if self.kind in ("hadamard", "mean") and not has_hadamard(self.size // self.blocks):
            raise TransformError(
                f"no Hadamard matrix of order {self.size // self.blocks} is known here; use kind 'random'"
            )

    def apply(self, x: Tensor, inverse: bool = False) -> Tensor:
        """x Q, or x Q' with `inverse`; [..., size] in the floating-point type of x."""
        if x.shape[-1] != self.size:
            raise TransformError(f"a rotation of size {self.size} cannot turn a last dimension of {x.shape[-1]}")
        parts = x.reshape(*x.shape[:-1], self.blocks, self.size // self.blocks)
        return _KINDS[self.kind](parts, self.seed, inverse).reshape(x.shape)

    def matrix(self) -> Tensor:
        """Q as float64 [size, size]."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))


def rotation_for(size: int, seed: int, *, mean: bool = False, blocks: int = 1) -> Rotation:
    """The best rotation of a size: Hadamard where there is one, else random. `mean`: it keeps the all-ones direction."""
    if has_hadamard(size // blocks):
        return Rotation(size, "mean" if mean else "hadamard", seed, blocks)
    return Rotation(size, "random-mean" if mean else "random", seed, blocks)


def online_rotation(size: int, seed: int) -> Rotation:
    """A rotation that is cheap while the model runs: a Hadamard matrix, or blocks of the largest power of two that fits.

    n log2(n) additions a token, or n log2(n / blocks). TransformError for an odd size.
    """
    if has_hadamard(size):
        return Rotation(size, "hadamard", seed)
    power = size & -size
    if power == 1:
        raise TransformError(f"no Hadamard matrix divides the odd size {size}; leave the online rotation out")
    return Rotation(size, "hadamard", seed, size // power)


def has_hadamard(n: int) -> bool:
    """Whether a Hadamard matrix of order n can be built here."""
    return _split(n) is not None


def hadamard(n: int) -> Tensor:
    """A Hadamard matrix of order n, float64 of +-1, its first column all ones. TransformError where none is known here."""
    if not has_hadamard(n):
        raise TransformError(f"no Hadamard matrix of order {n} can be built here; use a random rotation")
    return multiply(torch.eye(n, dtype=torch.float64))


def multiply(x: Tensor, transposed: bool = False) -> Tensor:
    """x H, or x H' when `transposed`, for the Hadamard matrix of x's last dimension: H = kron(Sylvester, core).

    n log2(n / m) additions a row for the Sylvester part (the fast Walsh-Hadamard transform), n m for a core of order m.
    """
    n = x.shape[-1]
    power, order = _split(n) or (0, 0)
    y = x.reshape(-1, power, order)
    if order > 1:
        core = _core(order)
        y = y @ (core.mT if transposed else core).to(y)  # type: ignore[union-attr]
    half = 1
    while half < power:
        pairs = y.reshape(-1, power // (2 * half), 2, half, order)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack((a + b, a - b), dim=2)
        half *= 2
    return y.reshape(x.shape)


def _hadamard(x: Tensor, seed: int, inverse: bool) -> Tensor:
    n = x.shape[-1]
    signs = _signs(n, seed).to(x)
    if inverse:
        return multiply(x, transposed=True) / n**0.5 * signs
    return multiply(x * signs) / n**0.5


def _mean(x: Tensor, seed: int, inverse: bool) -> Tensor:
    """H' 1 = n e_0, as the first column of H is all ones; with signs_0 = 1, x Q 1 = x 1. Q is its own inverse."""
    n = x.shape[-1]
    signs = _signs(n, seed).to(x)
    signs[0] = 1
    return multiply(multiply(x) * signs, transposed=True) / n


def _random(x: Tensor, seed: int, inverse: bool) -> Tensor:
    q = _orthogonal(x.shape[-1], seed).to(x)
    return x @ (q.mT if inverse else q)


def _random_mean(x: Tensor, seed: int, inverse: bool) -> Tensor:
    """u u' + V R V', where u is the unit vector of ones, V a basis of what is orthogonal to it, R random orthogonal."""
    q = _keeping_ones(x.shape[-1], seed).to(x)
    return x @ (q.mT if inverse else q)


_KINDS = {"hadamard": _hadamard, "mean": _mean, "random": _random, "random-mean": _random_mean}


def _signs(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1


@lru_cache(maxsize=4)
def _orthogonal(n: int, seed: int) -> Tensor:
    """Uniform over orthogonal matrices: QR of a Gaussian matrix with the signs of R's diagonal moved into Q."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


@lru_cache(maxsize=4)
def _keeping_ones(n: int, seed: int) -> Tensor:
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    basis = torch.eye(n, dtype=torch.float64)
    basis[:, 0] = 1
    basis = torch.linalg.qr(basis)[0]
    u, v = basis[:, :1], basis[:, 1:]
    return u @ u.mT + v @ _orthogonal(n - 1, seed) @ v.mT


@lru_cache(maxsize=256)
def _split(n: int) -> tuple[int, int] | None:
    """n = power of two * order of a core, with the smallest core there is; None where there is none."""
    order = n // (n & -n) if n > 0 else n
    while 0 < order <= min(n, _LARGEST_CORE):
        if _core(order) is not None:
            return n // order, order
        order *= 2
    return None


@lru_cache(maxsize=64)
def _core(order: int) -> Tensor | None:
    """A Hadamard matrix of this order that is no Kronecker product, with ones in the first column, or None."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4:
        return None
    for construct in (_paley_one, _paley_two, williamson, baumert_hall):
        found = construct(order)
        if found is not None:
            return found * found[:, :1]
    return None


def _paley_one(order: int) -> Tensor | None:
    """I + S, where S = [[0, 1], [-1', Q]] and Q is the Jacobsthal matrix of a prime q = 3 mod 4; order q + 1."""
    q = order - 1
    if q % 4 != 3 or not _is_prime(q):
        return None
    skew = torch.zeros(order, order, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _jacobsthal(q)
    return skew + torch.eye(order, dtype=torch.float64)


def _paley_two(order: int) -> Tensor | None:
    """kron(C, [[1, 1], [1, -1]]) + kron(I, [[1, -1], [-1, -1]]) with C = [[0, 1], [1', Q]], q = 1 mod 4; order 2 (q + 1)."""
    q = order // 2 - 1
    if q % 4 != 1 or not _is_prime(q):
        return None
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, _jacobsthal(q)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)


def _jacobsthal(q: int) -> Tensor:
    """Q_ij = 1 if i - j is a nonzero square modulo the prime q, -1 if it is none, 0 on the diagonal."""
    legendre = -torch.ones(q, dtype=torch.float64)
    legendre[torch.arange(1, q).square() % q] = 1
    legendre[0] = 0
    i = torch.arange(q)
    return legendre[(i[:, None] - i[None, :]) % q]


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, isqrt(q) + 1))
