"""Every ggml block type: our codes in ggml's bytes, read by ggml's own Python reader, value for value."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.formats import QTensor, parse_format
from lowbit.interchange.exporters.gguf.types import TYPES, BlockType, nearest_type, type_of
from lowbit.interchange.layouts.gguf import FORMATS
from lowbit.solvers import Call

gguf = pytest.importorskip("gguf")
ids = [kind.name for kind in TYPES]


def theirs(kind: BlockType, q: QTensor) -> torch.Tensor:
    data = kind.pack(q)
    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]]
    assert kind.size == size and data.dtype == np.uint8
    assert data.shape == (q.shape[0], q.shape[1] // size * nbytes)
    return torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind.name])).view(q.shape)


def drawn(kind: BlockType, rows: int, blocks: int, seed: int) -> QTensor:
    """Codes and scales drawn from everything that the format can store, not only what solvers make."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, kind.size * blocks)
    parts = {}
    for name, (dtype, size) in kind.format.parts(shape).items():
        if dtype == torch.uint8:
            parts[name] = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
            if kind.text == "mxfp4" and name == "scale":  # exponents that float32 holds as normal numbers
                parts[name] = parts[name].clamp(2, 250)
        else:
            parts[name] = torch.randn(size, generator=generator).to(dtype)
    return QTensor.from_parts(kind.format, shape, parts)


@pytest.mark.parametrize("kind", TYPES, ids=ids)
@hypothesis.settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_any_codes_and_scales_come_back_value_for_value(kind, rows, blocks, seed):
    q = drawn(kind, rows, blocks, seed)
    assert torch.equal(theirs(kind, q), q.dequantize())


@pytest.mark.parametrize("kind", TYPES, ids=ids)
def test_what_solvers_make_comes_back_and_is_near_the_weight(kind):
    x = torch.randn(6, 512, generator=torch.Generator().manual_seed(1)) * 0.03
    q = Call("rtn")(x, kind.format, Call("search"), None)
    values = theirs(kind, q)
    assert torch.equal(values, q.dequantize())
    bound = {2: 0.4, 3: 0.25, 4: 0.13, 5: 0.06, 6: 0.03, 8: 0.01}[kind.format.grid.bits]
    assert float((values - x).norm() / x.norm()) < bound


@pytest.mark.parametrize("kind", TYPES, ids=ids)
def test_sizes_are_ggmls(kind):
    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]]
    assert kind.format.nbytes((3, size * 2)) == 3 * 2 * nbytes
    assert type_of(kind.format) is kind


@pytest.mark.parametrize("kind", [k for k in TYPES if k.format.offset is not None], ids=lambda k: k.name)
def test_blocks_of_one_sign_and_of_one_value_are_held_too(kind):
    """Minima of k-quants are at most zero, so blocks above zero must be covered from zero on."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(4, 512, generator=generator) * 0.1 + 0.2  # all above zero
    x[1] = -x[1]
    x[2, :64] = 0.0
    x[3, :64] = 0.25
    for fit in ("search", "minmax", "mse"):
        q = Call("rtn")(x, kind.format, Call(fit), None)
        values = theirs(kind, q)
        assert torch.equal(values, q.dequantize())
        assert float((values - x).norm() / x.norm()) < (0.2 if kind.format.grid.bits == 2 else 0.06)


def test_readers_and_writers_name_the_same_formats():
    assert {kind.name: kind.format for kind in TYPES} == {name: parse_format(text) for name, text in FORMATS.items()}


def test_the_nearest_type_holds_as_many_bits():
    expected = {
        "int8:channel": "q8_0", "int4:g64": "q4_0", "uint4:g64:asym": "q4_1", "nf4:g64": "iq4_nl", "int3:g32": "iq4_nl",
        "int5:g64": "q5_0", "uint5:channel:asym": "q5_1", "e4m3:channel": "q8_0", "kmeans4:channel": "iq4_nl",
        "int6:g32": "q8_0", "nvfp4": "iq4_nl",
    }  # fmt: skip
    assert {text: nearest_type(parse_format(text)).text for text in expected} == expected
    assert type_of(parse_format("int4:g64")) is None and type_of(parse_format("int4:g32:s=bf16")) is None
