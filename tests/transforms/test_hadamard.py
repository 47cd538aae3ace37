"""Hadamard matrices by their definition, the fast product against the explicit one, and rotations."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import TransformError
from lowbit.transforms.hadamard import Rotation, hadamard, has_hadamard, multiply, online_rotation, rotation_for
from lowbit.transforms.williamson import baumert_hall, circulants, williamson

# The cores that model widths need, and widths made of them.
CORES = (1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 44, 52, 60, 76, 108, 140, 148, 156, 172)
WIDTHS = (576, 768, 896, 1024, 1152, 1536, 2560)


@pytest.mark.parametrize("n", CORES + WIDTHS)
def test_a_hadamard_matrix_has_signs_for_entries_and_orthogonal_rows(n: int) -> None:
    h = hadamard(n)
    assert h.shape == (n, n) and h.dtype == torch.float64
    assert torch.equal(h.abs(), torch.ones_like(h))
    assert torch.equal(h @ h.mT, n * torch.eye(n, dtype=torch.float64))  # exact: sums of +-1
    assert torch.equal(h[:, 0], torch.ones(n, dtype=torch.float64))


def test_the_widths_of_models_that_people_use_all_have_one() -> None:
    for n in (11008, 13824, 14336, 18944, 28672, 4864, 8960, 3072, 5120, 6656, 8192, 9984):
        assert has_hadamard(n), n


def test_sylvester_by_its_recursion() -> None:
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(6):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    assert torch.equal(hadamard(64), h)


@pytest.mark.parametrize("n", [1, 8, 12, 24, 36, 96, 144, 172])
def test_the_fast_product_is_the_product(n: int) -> None:
    h, x = hadamard(n), torch.randn(3, 5, n, dtype=torch.float64)
    assert torch.allclose(multiply(x), x @ h, rtol=1e-12, atol=1e-12)
    assert torch.allclose(multiply(x, transposed=True), x @ h.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [3, 6, 10, 54, 92, 0, -4])
def test_orders_that_cannot_be_or_are_not_known_are_refused(n: int) -> None:
    assert not has_hadamard(n)
    with pytest.raises(TransformError, match=f"order {n} "):
        hadamard(n)


@pytest.mark.parametrize("m", [3, 5, 7, 9, 13, 43])
def test_four_circulants_add_up(m: int) -> None:
    rows = circulants(m)
    assert rows is not None
    index = (torch.arange(m)[:, None] - torch.arange(m)[None, :]) % m
    squares = sum(row[index] @ row[index].mT for row in rows)
    assert torch.equal(squares, 4 * m * torch.eye(m, dtype=torch.float64))


def test_patterns_that_do_not_fit_give_nothing() -> None:
    assert williamson(8) is None and williamson(156) is None and williamson(10) is None
    assert baumert_hall(52) is None and baumert_hall(24) is None
    assert baumert_hall(156) is not None


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("kind", ["hadamard", "mean", "random", "random-mean"])
@pytest.mark.parametrize("size", [8, 24, 72, 80])
def test_rotations_are_orthogonal_and_undone(size: int, kind: str, blocks: int) -> None:
    rotation = Rotation(size, kind, seed=5, blocks=blocks)
    q, eye = rotation.matrix(), torch.eye(size, dtype=torch.float64)
    assert float((q @ q.mT - eye).abs().max()) < 1e-12
    x = torch.randn(2, 3, size, dtype=torch.float64)
    assert torch.allclose(rotation.apply(x), x @ q, rtol=1e-12, atol=1e-12)
    assert torch.allclose(rotation.apply(rotation.apply(x), inverse=True), x, rtol=1e-12, atol=1e-12)
    assert torch.equal(q, Rotation(size, kind, 5, blocks).matrix())
    assert not torch.allclose(q, Rotation(size, kind, 6, blocks).matrix())
    if blocks > 1:
        assert not q[: size // 2, size // 2 :].any()


@pytest.mark.parametrize("size", [1, 2, 7, 24, 54, 64, 576])
def test_rotations_for_layer_norm_keep_the_mean(size: int) -> None:
    q = rotation_for(size, 3, mean=True).matrix()
    ones = torch.ones(size, dtype=torch.float64)
    assert float((q @ ones - ones).abs().max()) < 1e-12 and float((ones @ q - ones).abs().max()) < 1e-12
    assert float((q @ q.mT - torch.eye(size)).abs().max()) < 1e-12
    if size > 20:
        assert float(q.abs().max()) < 5 / size**0.5  # spread out: no entry near 1


def test_a_random_rotation_has_no_preferred_direction() -> None:
    """Over seeds, an entry of a uniform orthogonal matrix has mean 0; plain QR would give the diagonal one sign."""
    corners = torch.stack([Rotation(6, "random", seed).matrix()[0, 0] for seed in range(400)])
    assert abs(float(corners.mean())) < 0.1


def test_online_rotations_fall_back_to_blocks() -> None:
    assert online_rotation(1536, 0) == Rotation(1536, "hadamard", 0)
    assert online_rotation(90, 0) == Rotation(90, "hadamard", 0, blocks=45)
    with pytest.raises(TransformError, match="odd size 45"):
        online_rotation(45, 0)


def test_impossible_rotations_are_refused() -> None:
    with pytest.raises(TransformError, match="kinds are hadamard"):
        Rotation(8, "givens")
    with pytest.raises(TransformError, match="3 blocks"):
        Rotation(8, blocks=3)
    with pytest.raises(TransformError, match="order 54"):
        Rotation(54)
    with pytest.raises(TransformError, match="last dimension of 4"):
        Rotation(8).apply(torch.zeros(2, 4))
