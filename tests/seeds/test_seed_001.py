"""Seed 001, "Quantization in Large Language Models": every tensor and error that it prints."""

from __future__ import annotations

import pytest
import torch
from seed_words import levels, printed, quantize
from torch import Tensor

from lowbit.kernels.integer import integer_matmul


@pytest.fixture(scope="module")
def given() -> tuple[Tensor, Tensor]:
    """(W, x) of the document."""
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        w, x = torch.randn(3, 5), torch.randn(5)
    w[0, 0] = 0
    x[0] = 0
    return w, x


def test_the_float_product(given):
    w, x = given
    assert printed(w, 0, -0.2934, -2.1788, 0.5684, -1.0845, -1.3986, 0.4033, 0.8380, -0.7193, -0.4033,
                   -0.5966, 0.1820, -0.8567, 1.1006, -1.0712)  # fmt: skip
    assert printed(x, 0, -0.5663, 0.3731, -0.8920, -1.5091)
    assert printed(w @ x, 0.4829, 1.3345, 0.2121)


class TestAbsmax:
    def test_w(self, given):
        q = quantize(given[0], "absmax")
        assert levels(q).tolist() == [[0, -17, -127, 33, -63], [-82, 24, 49, -42, -24], [-35, 11, -50, 64, -62]]
        assert printed(q.dequantize(), 0, -0.2916, -2.1788, 0.5661, -1.0808, -1.4068, 0.4117, 0.8406, -0.7205, -0.4117,
                       -0.6005, 0.1887, -0.8578, 1.0980, -1.0637)  # fmt: skip
        assert printed((given[0] - q.dequantize()).abs().mean(), 0.0039)

    def test_x(self, given):
        q = quantize(given[1], "absmax")
        assert levels(q).tolist() == [0, -48, 31, -75, -127]
        assert printed(q.dequantize(), 0, -0.5704, 0.3684, -0.8912, -1.5091)
        assert printed((given[1] - q.dequantize()).abs().mean(), 0.0019)

    def test_int8_sums_overflow_and_int32_sums_do_not(self, given):
        w, x = (levels(quantize(t, "absmax")) for t in given)
        assert (w.to(torch.int8) @ x.to(torch.int8)).tolist() == [101, -91, -28]
        assert (w.to(torch.int16) @ x.to(torch.int16)).tolist() == [2405, 6565, 996]
        assert (w @ x).tolist() == [2405, 6565, 996]

    def test_the_integer_product(self, given):
        w, x = given
        out = integer_matmul(quantize(x, "absmax"), quantize(w, "absmax"))
        assert printed(out, 0.4903, 1.3383, 0.2030)
        assert printed((out - w @ x).abs().mean(), 0.0068)


class TestMinmax:
    def test_w(self, given):
        q = quantize(given[0], "minmax")
        assert levels(q).tolist() == [[41, 19, -128, 86, -43], [-67, 73, 107, -15, 10], [-5, 56, -25, 127, -42]]
        assert printed(q.dequantize(), -0.0054, -0.2883, -2.1788, 0.5733, -1.0857, -1.3943, 0.4061, 0.8434, -0.7256, -0.4041,
                       -0.5970, 0.1875, -0.8542, 1.1006, -1.0728)  # fmt: skip
        assert printed((given[0] - q.dequantize()).abs().mean(), 0.0031)
        assert printed(q.offsets(), 41.4189)

    def test_zero_is_not_exact_and_the_whole_range_is_used(self, given):
        q = quantize(given[0], "minmax")
        assert q.dequantize()[0, 0] != 0
        assert levels(q).min() == -128 and levels(q).max() == 127

    def test_the_corrected_product(self, given):
        """The document's correction, on our codes, scales and zero-points."""
        w, x = given
        q_w, q_x = quantize(w, "minmax"), quantize(x, "minmax")
        scale_w, scale_x = (1 / float(q.scales()) for q in (q_w, q_x))
        zero_w, zero_x = (float(q.offsets()) for q in (q_w, q_x))
        out_q = levels(q_w) @ levels(q_x)
        out = out_q - w.shape[1] * zero_w * zero_x - w.sum(1) * scale_w * zero_x - x.sum() * scale_x * zero_w
        out = out / (scale_w * scale_x)
        assert printed(out, 0.4812, 1.3489, 0.2222)
        assert printed((out - w @ x).abs().mean(), 0.0087)

    def test_the_exact_correction_is_closer(self, given):
        """The document takes the sums in its correction from the float W and x, which a kernel does not have.

        Sums of the codes, as in `integer_matmul`, give just what the dequantized operands do; its error is smaller.
        """
        w, x = given
        q_w, q_x = quantize(w, "minmax"), quantize(x, "minmax")
        out = integer_matmul(q_x, q_w)
        torch.testing.assert_close(out, q_w.dequantize() @ q_x.dequantize(), rtol=1e-5, atol=1e-6)
        assert printed(out, 0.4784, 1.3450, 0.2179)
        assert float((out - w @ x).abs().mean()) < 0.0087


def test_extra_stuff_rows_and_groups_of_their_own(given):
    """ "How would that have changed the results?" Each row then errs by at most half a step of its own."""
    from lowbit.formats import parse_format
    from lowbit.solvers import Call

    w, x = given
    q_x = quantize(x, "absmax")
    error = {}
    for block in ("tensor", "channel", "g1"):
        q = Call("rtn")(w, parse_format(f"int8:{block}:s=fp32"), Call("absmax"), None)
        error[block] = float((w - q.dequantize()).abs().mean())
        torch.testing.assert_close(integer_matmul(q_x, q), q.dequantize() @ q_x.dequantize(), rtol=1e-5, atol=1e-6)
    assert error["tensor"] > error["channel"] > error["g1"] == 0
