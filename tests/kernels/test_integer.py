"""The integer product against float64 products of what the codes stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.formats import QTensor, parse_format
from lowbit.kernels.integer import _borders, _product, integer_matmul
from lowbit.solvers import Call
from strategies import normal, steady

BLOCKS = ["tensor", "channel", "g8", "g5", "g1", "2x4", "*x6", "3x*"]
GRIDS = ["int8", "uint8", "int4", "uint3", "int2:narrow", "int8:narrow"]
OFFSETS = ["", ":asym", ":zero=int32", ":zero=fp32", ":zero=fp16", ":min=fp32", ":min=fp16"]


@st.composite
def texts(draw) -> str:
    """Formats of integer operands, with any block, offset and scale store."""
    if draw(st.integers(0, 5)) == 0:
        return f"{draw(st.sampled_from(['ternary', 'binary', 'iq4nl']))}:{draw(st.sampled_from(BLOCKS))}"
    grid, _, narrow = draw(st.sampled_from(GRIDS)).partition(":")
    offset = draw(st.sampled_from(OFFSETS))
    if grid.startswith("uint") and not offset:
        offset = ":asym"
    text = f"{grid}:{draw(st.sampled_from(BLOCKS))}{':narrow' if narrow else ''}{offset}"
    return text + draw(st.sampled_from(["", ":s=fp32", ":s=bf16", ":s=e8m0", ":s=(uint8:g8)"]))


def quantized(x: torch.Tensor, text: str) -> QTensor:
    fmt = parse_format(text)
    return Call("rtn")(x, fmt, Call("minmax" if fmt.offset else "absmax"), None)


def check(a: QTensor, b: QTensor) -> None:
    """1e-6 of the norms of the two rows: what dequantize() itself rounds off in float32."""
    found, left, right = integer_matmul(a, b), a.dequantize().double(), b.dequantize().double()
    expected = left @ right.T
    assert found.dtype == torch.float32 and found.shape == expected.shape
    size = left.view(-1, left.shape[-1]).norm(dim=1)[:, None] * right.view(-1, right.shape[-1]).norm(dim=1)
    assert bool(((found.double() - expected).view(size.shape).abs() <= 1e-6 * size + 1e-30).all())


@steady(300)
@given(
    texts(), texts(), st.integers(1, 5), st.integers(1, 7), st.integers(1, 40), st.integers(0, 10**6), st.floats(-3, 3)
)
def test_it_is_the_product_of_the_dequantized_operands(left, right, m, n, k, seed, shift):
    check(quantized(normal((m, k), seed) + shift, left), quantized(normal((n, k), seed + 1) - shift / 2, right))


@pytest.mark.parametrize("text", ["int8:channel", "uint8:g16:zero=fp32", "int4:g16:asym"])
def test_vectors_are_one_row_and_leave_no_dimension(text):
    x, w = quantized(normal((48,), 1), text), quantized(normal((7, 48), 2), text)
    assert (
        integer_matmul(x, w).shape == (7,) and integer_matmul(w, x).shape == (7,) and integer_matmul(x, x).shape == ()
    )
    check(x, w)
    assert torch.equal(integer_matmul(w, x), integer_matmul(x, w))


@steady(40)
@given(st.integers(1, 300), st.integers(0, 10**6), st.booleans())
def test_int32_sums_are_exact(k, seed, largest):
    """Codes times codes, against Python-sized integers (int64)."""
    generator = torch.Generator().manual_seed(seed)
    low = 255 if largest else -128
    a, b = (torch.randint(low, 256, (3, k), dtype=torch.int32, generator=generator) for _ in range(2))
    assert torch.equal(_product(a, b).long(), a.long() @ b.long().T)


def test_sums_too_long_for_int32_are_cut():
    """70000 products of 255 * 255 are 4.5e9: more than int32 holds."""
    k = 70_000
    x = torch.full((1, k), 255.0)
    x[0, -1] = 0
    q = quantized(x, "uint8:channel:asym")
    assert _borders(q, q, k) == [0, 33025, 66050, k]
    assert float(integer_matmul(q, q)) == pytest.approx(255.0**2 * (k - 1), rel=1e-7)
    levels = q.format.grid.decode(q.unpacked()).to(torch.int32)
    assert int(_product(levels, levels)) != 255**2 * (k - 1)  # what a single int32 sum gives: it wraps


def test_the_sum_is_cut_where_a_scale_of_either_operand_changes():
    a, b = quantized(normal((2, 20), 1), "int8:g8"), quantized(normal((3, 20), 2), "int8:2x5")
    assert _borders(a, b, 20) == [0, 5, 8, 10, 15, 16, 20]
    whole = quantized(normal((2, 20), 1), "int8:channel")
    assert _borders(whole, whole, 20) == [0, 20]


def test_a_zero_scale_beside_a_minimum_still_counts_the_minimum():
    fmt = parse_format("uint4:g4:s=(uint8:g8):min=fp32")
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.5, 0.5, 0.5, 0.5]])
    q = Call("rtn")(x, fmt, Call("minmax"), None)
    assert float(q.scales()[0, 0, 1]) == 0
    check(q, quantized(normal((3, 8), 3), "int8:channel"))


def test_finer_scales_bring_the_product_closer():
    """The question of the document: rows and groups of W with scales of their own."""
    w = normal((64, 256), 4) * torch.logspace(-1, 1, 64)[:, None] * torch.logspace(-1, 0, 256)
    x = normal((16, 256), 5)
    exact, errors = x.double() @ w.double().T, []
    for block in ("tensor", "channel", "g64", "g16"):
        found = integer_matmul(quantized(x, "int8:channel"), quantized(w, f"int4:{block}")).double()
        errors.append(float(((found - exact).norm(dim=0) / exact.norm(dim=0)).mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]


@pytest.mark.parametrize(
    ("a", "b", "shapes", "words"),
    [
        ("int8", "nf4", ((2, 8), (3, 8)), "nf4 has others"),
        ("e4m3", "int8", ((2, 8), (3, 8)), "e4m3 has others"),
        ("int8", "int8", ((2, 8), (3, 7)), "do not multiply"),
        ("int8", "int8", ((2, 8), (8, 3)), "do not multiply"),
        ("int8", "int8", ((2, 3, 8), (3, 8)), "vectors and matrices"),
        ("int8", "int8", ((), (8,)), "vectors and matrices"),
    ],
)
def test_operands_that_do_not_fit_are_errors(a, b, shapes, words):
    with pytest.raises(FormatError, match=words):
        integer_matmul(quantized(torch.ones(shapes[0]), a), quantized(torch.ones(shapes[1]), b))


def test_learned_levels_are_an_error():
    learned = Call("kmeans")(normal((2, 8), 6), parse_format("kmeans2"), Call("search"), None)
    with pytest.raises(FormatError, match="integer levels"):
        integer_matmul(learned, learned)


@pytest.mark.parametrize("shapes", [((0, 8), (3, 8)), ((2, 8), (0, 8)), ((2, 0), (3, 0))])
def test_empty_operands(shapes):
    a, b = (quantized(torch.ones(s), "int8:channel") for s in shapes)
    assert torch.equal(integer_matmul(a, b), torch.zeros(shapes[0][0], shapes[1][0]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_same():
    a, b = quantized(normal((4, 64), 7), "int8:channel:zero=fp32"), quantized(normal((8, 64), 8), "uint4:g16:asym")
    torch.testing.assert_close(
        integer_matmul(a.to("cuda"), b.to("cuda")).cpu(), integer_matmul(a, b), rtol=1e-6, atol=0
    )
