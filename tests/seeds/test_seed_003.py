"""Seed 003: its block-wise symmetric int8 pseudo-code as the oracle.

A block there is `block_cols` columns of *all* rows, `*x128` here; most tools mean 128 weights of one row, `g128`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from seed_words import levels, quantize

from lowbit.formats import parse_format
from lowbit.solvers import Call
from strategies import normal


def blockwise_quantize(weights: np.ndarray, block_cols: int = 128, bits: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """The pseudo-code of the document, made to run."""
    qmax = 2 ** (bits - 1) - 1
    codes, scales = np.empty(weights.shape, dtype=np.int8), []
    for start in range(0, weights.shape[1], block_cols):
        block = weights[:, start : start + block_cols]
        peak = np.max(np.abs(block))
        scale = peak / qmax if peak != 0 else 1.0
        scales.append(scale)
        codes[:, start : start + block_cols] = np.clip(np.round(block / scale), -qmax - 1, qmax).astype(np.int8)
    return codes, np.array(scales)


def dequantize(codes: np.ndarray, scales: np.ndarray, block_cols: int = 128) -> np.ndarray:
    return codes.astype(np.float32) * np.repeat(scales, block_cols)[: codes.shape[1]].astype(np.float32)


@pytest.mark.parametrize("shape", [(4, 128), (3, 300), (7, 50), (2, 129), (64, 512)])
def test_codes_scales_and_values_are_those_of_the_pseudo_code(shape):
    x = normal(shape, 1, spread=0.02)
    codes, scales = blockwise_quantize(x.numpy())
    q = quantize(x, "blockwise")
    assert tuple(q.scales().shape) == (1, 1, len(scales))
    np.testing.assert_allclose(q.scales()[0, 0].numpy(), scales, rtol=2e-7)
    exact = x.double().numpy() / np.repeat(scales, 128)[: shape[1]]
    tie = np.abs(exact - np.floor(exact) - 0.5) < 1e-4
    assert np.array_equal(levels(q).numpy()[~tie], codes[~tie])
    np.testing.assert_allclose(q.dequantize().numpy()[~tie], dequantize(codes, scales)[~tie], rtol=1e-6, atol=0)


def test_a_block_of_zeros_divides_by_nothing():
    x = normal((4, 256), 2)
    x[:, 128:] = 0
    assert bool((quantize(x, "blockwise").dequantize()[:, 128:] == 0).all())


@pytest.mark.parametrize(("bits", "cols"), [(4, 32), (3, 128), (8, 64)])
def test_other_widths_and_blocks(bits, cols):
    """ "Blocks (e.g., 32 or 128 columns)" at "8-bit, 4-bit, 3-bit"."""
    x = normal((6, 200), 3)
    codes, scales = blockwise_quantize(x.numpy(), cols, bits)
    q = Call("rtn")(x, parse_format(f"int{bits}:*x{cols}"), Call("absmax"), None)
    exact = x.double().numpy() / np.repeat(scales, cols)[:200]
    tie = np.abs(exact - np.floor(exact) - 0.5) < 1e-4
    assert np.array_equal(levels(q).numpy()[~tie], codes[~tie])


def test_finer_blocks_lower_the_error_at_the_cost_of_more_scales():
    """ "Reduces quantization error at the cost of more stored scales"."""
    x = normal((64, 512), 4) * torch.logspace(-1, 1, 512)
    errors, sizes = [], []
    for block in ("tensor", "*x128", "*x32", "g128", "g32"):
        q = Call("rtn")(x, parse_format(f"int4:{block}:s=fp32"), Call("absmax"), None)
        errors.append(float((q.dequantize() - x).norm() / x.norm()))
        sizes.append(q.nbytes)
    assert errors[0] > errors[1] > errors[2] and errors[1] > errors[3] > errors[4]
    assert sizes == [16384 + 4 * n for n in (1, 4, 16, 256, 1024)]


def test_a_codebook_beats_a_lattice_on_values_of_several_modes():
    """ "K-means / codebook: represent weights using a small codebook ... where distributions are multimodal"."""
    centres = torch.tensor([-3.0, -0.1, 0.2, 5.0])
    x = centres[torch.randint(0, 4, (4, 200), generator=torch.Generator().manual_seed(0))] + normal((4, 200), 5, 0.01)
    learned = Call("kmeans")(x, parse_format("kmeans2:channel"), Call("search"), None)
    lattice = Call("rtn")(x, parse_format("uint2:channel:zero=fp32"), Call("search"), None)
    assert float((learned.dequantize() - x).norm()) < 0.05 * float((lattice.dequantize() - x).norm())
