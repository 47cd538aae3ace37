"""Values against the `gguf` package, where a ggml type has the layout of one of our formats.

Our own writer of blocks is held to it in tests/interchange/test_gguf_blocks.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.formats import Format, QTensor, encode, parse_format
from lowbit.formats.packing import pack
from lowbit.solvers import Call
from strategies import normal

gguf = pytest.importorskip("gguf")
TYPES = gguf.GGMLQuantizationType
ROWS, COLS = 24, 256


def theirs(x: Tensor, kind: str) -> tuple[np.ndarray, Tensor]:
    """(blocks of bytes, dequantized values) of what gguf makes of `x`."""
    data = gguf.quantize(x.numpy(), TYPES[kind])
    size = gguf.GGML_QUANT_SIZES[TYPES[kind]][1]
    return data.reshape(-1, size), torch.from_numpy(gguf.dequantize(data, TYPES[kind]))


def nibbles(data: np.ndarray) -> Tensor:
    """ggml keeps elements 0-15 of a block in the low nibbles of 16 bytes and 16-31 in the high ones."""
    codes = np.concatenate([data & 15, data >> 4], axis=1).reshape(ROWS, COLS)
    return torch.from_numpy(codes.copy())


def half(data: np.ndarray) -> Tensor:
    return torch.from_numpy(data.copy().view(np.float16)).view(1, ROWS, COLS // 32)


def as_qtensor(fmt: Format, codes: Tensor, **parts: Tensor) -> QTensor:
    return QTensor.from_parts(fmt, (ROWS, COLS), {"codes": pack(codes, fmt.grid.cardinality), **parts})


@pytest.fixture(scope="module")
def x() -> Tensor:
    return normal((ROWS, COLS), seed=4, spread=0.03)


def test_q8_0_means_the_same_and_absmax_chooses_the_same(x):
    data, values = theirs(x, "Q8_0")
    fmt = parse_format("q8_0")
    codes = torch.from_numpy((data[:, 2:].view(np.int8).astype(np.int16) + 128).astype(np.uint8)).view(ROWS, COLS)
    scale = half(data[:, :2])
    assert torch.equal(as_qtensor(fmt, codes, scale=scale).dequantize(), values)
    ours = Call("rtn")(x, fmt, Call("absmax"), None)
    assert torch.equal(ours.scale, scale)
    # ggml rounds under the float32 scale, we under the float16 one that is stored: never further away.
    assert bool(((ours.dequantize() - x).abs() <= (values - x).abs() + 1e-9).all())
    assert int((ours.unpacked().int() - codes.int()).abs().max()) <= 1
    # With a scale of 1/64, which float16 holds, the two agree to the bit.
    exact = (x / x.abs().amax() * 127).round() / 64
    exact[:, ::32] = 127 / 64
    assert torch.equal(Call("rtn")(exact, fmt, Call("absmax"), None).dequantize(), theirs(exact, "Q8_0")[1])


def test_q4_0_means_the_same(x):
    data, values = theirs(x, "Q4_0")
    fmt = parse_format("q4_0")
    q = as_qtensor(fmt, nibbles(data[:, 2:]), scale=half(data[:, :2]))
    assert torch.equal(q.dequantize(), values)
    # Under its scale (the signed maximum at -8) our codes are at least as near.
    again = encode(x, fmt, q.scales())
    assert bool(((again.dequantize() - x).abs() <= (values - x).abs() + 1e-9).all())


def test_q4_1_means_the_same_and_minmax_chooses_the_same(x):
    data, values = theirs(x, "Q4_1")
    fmt = parse_format("q4_1")
    scale, minimum = half(data[:, :2]), half(data[:, 2:4])
    torch.testing.assert_close(
        as_qtensor(fmt, nibbles(data[:, 4:]), scale=scale, offset=minimum).dequantize(), values, rtol=0, atol=0
    )
    ours = Call("rtn")(x, fmt, Call("minmax"), None)
    assert torch.equal(ours.scale, scale) and torch.equal(ours.offset, minimum)
    assert bool(((ours.dequantize() - x).abs() <= (values - x).abs() + 1e-7).all())


def test_mxfp4_means_the_same_and_mx_chooses_the_same(x):
    data, values = theirs(x, "MXFP4")
    fmt = parse_format("mxfp4")
    scale = torch.from_numpy(data[:, :1].copy()).view(1, ROWS, COLS // 32)
    assert torch.equal(as_qtensor(fmt, nibbles(data[:, 1:]), scale=scale).dequantize(), values)
    ours = Call("rtn")(x, fmt, Call("mx"), None)
    assert torch.equal(ours.scale, scale)
    # Levels are chosen alike except for exact ties, where both are as near.
    assert torch.equal((ours.dequantize() - x).abs(), (values - x).abs())


def test_iq4_nl_means_the_same(x):
    fmt = parse_format("iq4nl:g32")
    q = Call("rtn")(x, fmt, Call("search"), None)
    codes = q.unpacked().view(-1, 32).numpy()
    blocks = np.concatenate(
        [q.scale.view(-1, 1).numpy().view(np.uint8), codes[:, :16] | (codes[:, 16:] << 4)], axis=1
    ).reshape(ROWS, -1)
    values = torch.from_numpy(gguf.dequantize(np.ascontiguousarray(blocks), TYPES.IQ4_NL))
    assert torch.equal(q.dequantize(), values.view(ROWS, COLS))


def test_nvfp4_scales_mean_the_same(x):
    """ggml's NVFP4 has no tensor scale; ours at 1 means the same. Blocks of 16, four scales in front."""
    if "NVFP4" not in TYPES.__members__:
        pytest.skip("this gguf has no NVFP4")
    fmt = parse_format("e2m1:g16:s=e4m3")
    q = Call("rtn")(x, fmt, Call("absmax"), None)
    codes = q.unpacked().view(-1, 4, 16).numpy()
    packed = (codes[..., :8] | (codes[..., 8:] << 4)).reshape(-1, 32)
    blocks = np.concatenate([q.scale.view(-1, 4).numpy(), packed], axis=1).reshape(ROWS, -1)
    values = torch.from_numpy(gguf.dequantize(np.ascontiguousarray(blocks), TYPES.NVFP4))
    torch.testing.assert_close(q.dequantize(), values.view(ROWS, COLS).float(), rtol=0, atol=0)
