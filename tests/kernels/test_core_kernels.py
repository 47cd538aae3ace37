"""The C++ kernels against the definition of a QTensor, with every set of instructions that this machine has."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import lowbit
from lowbit.formats import InputQuantizer, parse_format, parse_inputs
from lowbit.kernels.core import core
from lowbit.kernels.cpu import Packed
from lowbit.kernels.layout import codes_of, pack

module: Any = core()
pytestmark = pytest.mark.skipif(module is None, reason="the C++ core is not built")
ISAS = module.isas() if module is not None else ["portable"]
FORMATS = (
    "int4:g32", "int4:g64", "int4:g128", "int4:channel", "int8:channel", "int8:g32", "int3:g32", "int2:g64", "int5:g32",
    "int6:g64", "ternary:g32", "iq4nl:g32", "mxfp4", "int4:g32:asym", "uint8:channel:asym", "int8:tensor",
)  # fmt: skip
SHAPES = ((1, 32), (16, 48), (17, 80), (48, 200), (33, 576))


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


def weight(fmt: str, shape: tuple[int, int], seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    w[0, 0] = 6.0  # one outlier, so that scales differ
    return lowbit.quantize_tensor(w, parse_format(fmt))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_float_activations(isa: str, fmt: str) -> None:
    for i, shape in enumerate(SHAPES):
        q = weight(fmt, shape, i)
        kernel = Packed(isa)
        form = kernel.prepack(q, torch.float32)
        for rows in (1, 2, 7, 97):
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows))
            bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(rows))
            dense = q.dequantize().double()
            error = kernel.linear(x, form, bias).double() - (x.double() @ dense.T + bias.double())
            size = x.double().norm() * dense.norm() / shape[1] ** 0.5  # of sums that do not cancel
            assert float(error.norm() / size) < 1e-4, (shape, rows)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("inputs", ["int8:token", "int8:g32"])
def test_quantized_activations_are_exact(isa: str, inputs: str) -> None:
    """What is left beside the product of the rounded values is the float32 sum over groups."""
    for fmt in ("int4:g32", "int8:channel", "iq4nl:g32", "int4:g32:asym"):
        q = weight(fmt, (33, 192))
        quantizer = InputQuantizer.of(parse_inputs(inputs), 192, {})
        kernel = Packed(isa)
        form = kernel.prepack(q, torch.float32, quantizer)
        for rows in (1, 6, 20):
            x = torch.randn(rows, 192, generator=torch.Generator().manual_seed(rows))
            right = quantizer.round(x).double() @ q.dequantize().double().T
            assert relative(kernel.linear_of_quantized(x, form, None, quantizer), right) < 2e-6, (fmt, rows)


@pytest.mark.parametrize("isa", ISAS)
def test_the_largest_sums_fit(isa: str) -> None:
    """Every code and every activation at its end: 128 columns of 255 x 16256 are the most that an int32 must hold."""
    codes = torch.full((16, 128), 255, dtype=torch.uint8)
    q = lowbit.quantize_tensor(torch.linspace(0, 1, 16 * 128).view(16, 128), parse_format("uint8:channel:asym"))
    q.codes.copy_(codes.view(q.codes.shape))
    kernel = Packed(isa)
    for sign in (1.0, -1.0):
        x = torch.full((3, 128), sign)
        right = x.double() @ q.dequantize().double().T
        assert relative(kernel.linear(x, kernel.prepack(q, torch.float32), None), right) < 1e-5


@pytest.mark.parametrize("isa", ISAS)
def test_zeros_and_extremes(isa: str) -> None:
    q, kernel = weight("int4:g32", (16, 64)), Packed(isa)
    form = kernel.prepack(q, torch.float32)
    assert bool((kernel.linear(torch.zeros(2, 64), form, None) == 0).all())
    for size in (1e-20, 1e20):
        x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)) * size
        assert relative(kernel.linear(x, form, None), x.double() @ q.dequantize().double().T) < 2e-4


@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_come_back(fmt: str) -> None:
    q = weight(fmt, (33, 200))
    packed, row = pack(module, [codes_of(q)]), torch.empty(200)
    for r in (0, 15, 16, 32):
        packed.unpack_row(r, row.numpy())
        torch.testing.assert_close(row, q.dequantize()[r], rtol=2e-6, atol=5e-7)


def test_the_same_for_any_number_of_threads() -> None:
    q = weight("int4:g32", (64, 576))
    x = torch.randn(40, 576)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            kernel = Packed()
            found.append(kernel.linear(x, kernel.prepack(q, torch.float32), None))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


def test_a_process_that_multiplied_ends_without_a_word() -> None:
    program = (
        "import torch, lowbit; from lowbit.nn.packed import PackedWeight; "
        "q = lowbit.quantize_tensor(torch.randn(32, 64), 'int8:channel'); "
        "from lowbit.kernels.thread_pool import multiplier; multiplier(); print(q.shape)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout and "leaked" not in done.stderr, done.stderr
