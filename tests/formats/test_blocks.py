"""Blocks against a loop over rows and columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.formats import CHANNEL, TENSOR, Block, blocks, group
from strategies import BLOCKS, normal, shapes, steady


def naive(shape: tuple[int, ...], block: Block) -> list[tuple[tuple[int, int, int], tuple]]:
    """((matrix, row block, column block), index into [batch, rows, cols]) of every block, by plain loops."""
    sizes = (1, 1, *shape)
    batch = 1
    for size in sizes[:-2]:
        batch *= size
    rows, cols = sizes[-2:]
    high, wide = rows if block.rows == -1 else block.rows, cols if block.cols == -1 else block.cols
    return [
        ((b, i, j), (b, slice(r, min(r + high, rows)), slice(c, min(c + wide, cols))))
        for b in range(batch)
        for i, r in enumerate(range(0, rows, max(high, 1)))
        for j, c in enumerate(range(0, cols, max(wide, 1)))
    ]


def matrices(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(blocks.as_matrices(tuple(x.shape)))


@pytest.fixture(params=[1 << 18, 7], ids=["whole", "in chunks of 7"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
class TestAgainstLoops:
    @steady(120)
    @given(shapes(), st.sampled_from(BLOCKS), st.integers(0, 10**6))
    def test_reduce(self, shape, block, seed):
        x, other = normal(shape, seed), normal(shape, seed + 1)

        def function(x, v, none):
            assert none is None and x.dim() == v.dim() == 2
            return (x.double() * v.double()).sum(1), None, torch.stack([x.amin(1), v.amax(1)], 1)

        total, nothing, ends = blocks.reduce_blocks(function, block, x, other, None)
        counts = block.counts(shape)
        assert nothing is None and tuple(total.shape) == counts and tuple(ends.shape) == (*counts, 2)
        seen = naive(shape, block) if x.numel() else []
        assert len(seen) == total.numel()
        for at, where in seen:
            a, b = matrices(x)[where], matrices(other)[where]
            torch.testing.assert_close(total[at], (a.double() * b.double()).sum())
            assert ends[at].tolist() == [a.min(), b.max()]

    @steady(120)
    @given(shapes(), st.sampled_from(BLOCKS), st.integers(0, 10**6))
    def test_map(self, shape, block, seed):
        x = normal(shape, seed)
        per_block = normal((*block.counts(shape), 2), seed + 1)

        def function(x, s, none):
            assert none is None
            return x * s[:, :1] + s[:, 1:]

        result = blocks.map_blocks(function, block, x, per_block, None, dtype=torch.float64)
        assert result.dtype == torch.float64 and result.shape == x.shape
        expected = torch.zeros_like(matrices(x))
        for at, where in naive(shape, block) if x.numel() else []:
            expected[where] = matrices(x)[where] * per_block[at][0] + per_block[at][1]
        torch.testing.assert_close(matrices(result), expected.double(), rtol=1e-6, atol=1e-6)

    def test_elements_keep_their_order_within_a_block(self):
        x = torch.arange(24.0).view(4, 6)
        (found,) = blocks.reduce_blocks(lambda b: b, Block(2, 3), x)
        assert found[0, 0, 1].tolist() == [3, 4, 5, 9, 10, 11]
        assert found[0, 1, 0].tolist() == [12, 13, 14, 18, 19, 20]


def test_codes_stay_bytes_and_everything_else_becomes_float32():
    seen = []

    def function(x, v):
        seen.append((x.dtype, v.dtype))
        return v.sum(1)

    blocks.reduce_blocks(
        function, CHANNEL, torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.float16)
    )
    assert seen == [(torch.uint8, torch.float32)]


def test_non_contiguous_weights():
    x = torch.arange(20.0).view(4, 5).T
    (found,) = blocks.reduce_blocks(lambda b: b.sum(1), group(2), x)
    assert found[0].tolist() == [[x[i, :2].sum(), x[i, 2:].sum()] for i in range(5)]


def test_counts_and_names():
    assert [str(b) for b in (TENSOR, CHANNEL, group(64), Block(128, 128))] == ["tensor", "channel", "g64", "128x128"]
    assert group(32).counts((10, 100)) == (1, 10, 4)
    assert Block(128, 128).counts((3, 2, 200, 300)) == (6, 2, 3)
    assert TENSOR.counts(()) == (1, 1, 1)
    assert CHANNEL.counts((7,)) == (1, 1, 1)
    assert group(4).counts((0, 8)) == (1, 0, 2)


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-2, 1), (1, -3)])
def test_a_block_without_elements_is_an_error(sizes):
    with pytest.raises(FormatError, match="at least 1 wide"):
        Block(*sizes)
