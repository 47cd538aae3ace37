"""Seed 000, "Naive Quantization Methods for LLMs": absmax and zero-point on [-0.3, 0, 0.1, 0.7]."""

from __future__ import annotations

import pytest
import torch
from seed_words import levels, quantize

EXAMPLE = torch.tensor([-0.3, 0.0, 0.1, 0.7])


def test_absmax_codes_and_zero_stays_zero():
    q = quantize(EXAMPLE, "absmax")
    assert levels(q).tolist() == [-54, 0, 18, 127]
    assert float(q.scales()) == pytest.approx(0.7 / 127)
    assert q.dequantize()[1] == 0
    # absmax_quantize of the document: ip_dequant = (scale * ip).round() / scale
    scale = 127 / EXAMPLE.abs().max()
    torch.testing.assert_close(q.dequantize(), (scale * EXAMPLE).round() / scale, rtol=1e-6, atol=0)


def test_zeropoint_is_minus_52():
    q = quantize(EXAMPLE, "zeropoint")
    assert float(q.offsets()) == -52
    assert 1 / float(q.scales()) == pytest.approx(255 / 1.0)
    # 0.1 * 255 - 52 = -26.5 is a tie but for the rounding of 255: -26 in the document's arithmetic, -27 in ours,
    # which rounds under the scale that is stored. Both are half a step away.
    codes = levels(q).tolist()
    assert codes[:2] + codes[3:] == [-128, -52, 126] and codes[2] in (-27, -26)
    assert q.dequantize()[1] == 0
    assert float((q.dequantize() - EXAMPLE).abs().max()) <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_zeropoint_is_the_function_of_the_document(seed):
    """zeropoint_quantize, on random values: the same codes but where a value lies on a tie."""
    x = torch.randn(500, generator=torch.Generator().manual_seed(seed))
    scale = 255 / (x.max() - x.min())
    zeropoint = (-scale * x.min() - 128).round()
    exact = x * scale + zeropoint
    codes = torch.clip(exact.round(), -128, 127)
    q = quantize(x, "zeropoint")
    assert float(q.offsets()) == float(zeropoint)
    tie = (exact - exact.floor() - 0.5).abs() < 1e-4
    assert torch.equal(levels(q)[~tie], codes.int()[~tie])
    torch.testing.assert_close(q.dequantize()[~tie], ((codes - zeropoint) / scale)[~tie], rtol=1e-5, atol=1e-6)


def test_a_constant_range_is_the_document_s_special_case():
    """`ip_range = 1 if ip_range == 0`: there to avoid a division by zero; here the constant is exact."""
    for value in (0.25, -3.0, 0.0):
        assert quantize(torch.full((4,), value), "zeropoint").dequantize().tolist() == [value] * 4
