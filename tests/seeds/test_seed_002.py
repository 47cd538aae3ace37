"""Seed 002, "5 Key Points to Unlock LLM Quantization": linear quantization of a 3x3 matrix to uint8.

The matrices are pictures there; its text gives the range: -0.40 goes to 0 and 0.50 to 255.
"""

from __future__ import annotations

import torch
from seed_words import levels, quantize

W = torch.tensor([[0.50, -0.13, 0.22], [-0.40, 0.00, 0.31], [0.07, -0.28, 0.45]])


def test_bounds_map_to_bounds():
    codes = levels(quantize(W, "linear"))
    assert codes[0, 0] == 255 and codes[1, 0] == 0
    assert codes.min() == 0 and codes.max() == 255


def test_scale_zero_point_and_codes_are_the_formulas():
    """s = (x_max - x_min) / (q_max - q_min), z = round(q_min - x_min / s), q = clip(round(x / s + z))."""
    q, w = quantize(W, "linear"), W.double()
    s = (w.max() - w.min()) / 255
    z = (0 - w.min() / s).round()
    assert float(q.offsets()) == float(z) == 113
    torch.testing.assert_close(q.scales().double().squeeze(), s, rtol=1e-6, atol=0)
    assert torch.equal(levels(q), (w / s + z).round().clamp(0, 255).int())


def test_zero_is_represented_exactly():
    assert quantize(W, "linear").dequantize()[1, 1] == 0


def test_the_error_matrix():
    """Point-by-point difference of the matrix and its dequantized version: at most half a step, mostly not zero."""
    q, w = quantize(W, "linear"), W.double()
    s = (w.max() - w.min()) / 255
    z = (0 - w.min() / s).round()
    expected = w - s * ((w / s + z).round().clamp(0, 255) - z)
    error = (W - q.dequantize()).double()
    torch.testing.assert_close(error, expected, rtol=0, atol=1e-7)
    assert float(error.abs().max()) <= float(s) / 2 + 1e-7
    assert int((error.abs() > 1e-6).sum()) >= 6


def test_a_range_without_zero_is_widened_so_that_zero_stays_exact():
    """The document asks for an integer that is zero: then 0 must lie in the range, and the bounds no longer map to bounds."""
    q = quantize(W + 1, "linear")
    assert float(q.offsets()) == 0 and levels(q).max() == 255 and int(levels(q).min()) == round(0.6 / 1.5 * 255)


def test_the_footprint_of_the_document():
    """9 bytes of codes instead of 36 of float32; the scale (4) and the zero-point (1) come on top."""
    parts = quantize(W, "linear").parts()
    assert {k: v.numel() * v.element_size() for k, v in parts.items()} == {"codes": 9, "scale": 4, "offset": 1}
