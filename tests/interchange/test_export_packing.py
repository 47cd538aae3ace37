"""What exporters store, decoded bit by bit by naive loops, is what lowbit stores: integers and scales, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.formats import QTensor, parse_format, parse_inputs
from lowbit.interchange.exporters.awq import Awq
from lowbit.interchange.exporters.compressed_tensors.activations import pack_inputs
from lowbit.interchange.exporters.gptq import Gptq
from lowbit.interchange.exporters.vllm import SCHEMES, Vllm
from lowbit.interchange.tensors import Contents, TensorPlan
from lowbit.pipeline.api import quantize_tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def weight(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.1


def stored(fmt: str, shape: tuple[int, ...], inputs: str | None = None) -> TensorPlan:
    parsed = None if inputs is None else parse_inputs(inputs)
    return TensorPlan("layers.0.up.weight", shape, "linear", torch.float32, False, parse_format(fmt), inputs=parsed)


class NoInputs:
    """What `pack` asks of a folder for a weight alone, whose inputs store nothing."""

    contents = Contents("m", "", None, {}, {})

    def read_inputs(self, name: str) -> dict[str, Tensor]:
        return {}


def packed(target: Any, q: QTensor, inputs: str | None = None) -> dict[str, Tensor]:
    """What a target writes for one weight, which must be what it announced."""
    one = stored(str(q.format), q.shape, inputs)
    assert target.problem(one) is None
    parts = target.pack(one, q, NoInputs())
    assert {k: (v.dtype, tuple(v.shape)) for k, v in parts.items()} == target.spec(one)
    return parts


def field(words: list[int], bits: int, i: int) -> int:
    """Code i of a stream of 32-bit words, lowest bits first."""
    value = sum((word & 0xFFFFFFFF) << (32 * k) for k, word in enumerate(words))
    return (value >> (bits * i)) & ((1 << bits) - 1)


@pytest.mark.parametrize(
    "fmt",
    ["int4:g32", "int4:channel", "int4:g64:s=bf16", "int8:g32", "int8:channel", "int8:tensor", "int8:channel:narrow",
     "uint4:g32:asym", "int4:g32:asym", "uint4:channel:asym", "int4:tensor", "int4:g32:s=(uint8:g8:s=fp32)"],
)  # fmt: skip
def test_pack_quantized(fmt: str) -> None:
    q = quantize_tensor(weight(16, 64), f"absmax@{fmt}" if "asym" not in fmt else f"minmax@{fmt}")
    parts, bits = packed(Vllm(), q), q.format.grid.bits
    scales, width = parts["weight_scale"].float(), q.shape[1]
    group = width // scales.shape[1]
    found = torch.empty(q.shape)
    for o in range(q.shape[0]):
        row = parts["weight_packed"][o].tolist()
        for i in range(width):
            zero = 1 << (bits - 1)
            if "weight_zero_point" in parts:
                zero = field(parts["weight_zero_point"][:, i // group].tolist(), bits, o)
            found[o, i] = scales[o, i // group] * (field(row, bits, i) - zero)
    assert torch.equal(found, q.dequantize())
    assert parts["weight_shape"].tolist() == list(q.shape)


@pytest.mark.parametrize("fmt", ["int8:channel", "int8:tensor", "int8:channel:narrow"])
def test_int_quantized(fmt: str) -> None:
    q = quantize_tensor(weight(16, 64), f"absmax@{fmt}")
    parts = packed(Vllm(), q, "int8:token")
    assert parts["weight"].dtype == torch.int8
    assert torch.equal(parts["weight"].float() * parts["weight_scale"], q.dequantize())


@pytest.mark.parametrize("fmt", ["e4m3:channel", "e4m3:tensor", "e4m3:128x128"])
def test_float_quantized(fmt: str) -> None:
    q = quantize_tensor(weight(128, 256), f"absmax@{fmt}")
    parts = packed(Vllm(), q)
    scale = parts["weight_scale"]
    if "128x" in fmt:
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(parts["weight"].float() * scale, q.dequantize())


def nibble_values(codes: Tensor) -> Tensor:
    """The e2m1 levels of bytes [rows, n], two to a byte, low nibble first."""
    out = torch.empty(codes.shape[0], 2 * codes.shape[1])
    for o in range(codes.shape[0]):
        for i in range(out.shape[1]):
            nibble = (int(codes[o, i // 2]) >> (4 * (i % 2))) & 15
            out[o, i] = E2M1[nibble & 7] * (-1 if nibble & 8 else 1)
    return out


def test_mxfp4_and_mxfp8() -> None:
    q = quantize_tensor(weight(8, 64), "mxfp4")
    parts = packed(Vllm(), q)
    scale = 2.0 ** (parts["weight_scale"].float() - 127)
    assert torch.equal(nibble_values(parts["weight_packed"]) * scale.repeat_interleave(32, 1), q.dequantize())
    q = quantize_tensor(weight(8, 64), "mxfp8")
    parts = packed(Vllm(), q)
    scale = 2.0 ** (parts["weight_scale"].float() - 127)
    assert torch.equal(parts["weight"].float() * scale.repeat_interleave(32, 1), q.dequantize())


@pytest.mark.parametrize("negative", [False, True])
def test_nvfp4_with_positive_scales_whatever_their_sign_was(negative: bool) -> None:
    q = quantize_tensor(weight(8, 64), "nvfp4")
    if negative:  # as a search that takes the signed extreme gives
        assert isinstance(q.scale, QTensor)
        q.scale.codes[::3] |= 0x80
    parts = packed(Vllm(), q)
    scale = parts["weight_scale"].float()
    assert bool((scale >= 0).all())
    found = nibble_values(parts["weight_packed"]) * (scale / parts["weight_global_scale"]).repeat_interleave(16, 1)
    assert float((found - q.dequantize()).norm() / q.dequantize().norm()) < 1e-6


def test_nvfp4_on_a_common_scale_is_as_near_as_its_scales_allow() -> None:
    small, large = quantize_tensor(weight(8, 64), "nvfp4"), quantize_tensor(3 * weight(8, 64, 1), "nvfp4")
    scheme = next(s for s in SCHEMES if s.shares_scale)
    moved, same = scheme.rescaled(small, [large]), scheme.rescaled(large, [small])
    assert same is large
    assert scheme.pack(moved)["weight_global_scale"] == scheme.pack(large)["weight_global_scale"]
    distance = (moved.dequantize() - small.dequantize()).norm() / small.dequantize().norm()
    assert 0 < float(distance) <= 2.0**-4


@pytest.mark.parametrize("inputs", ["int8:tensor:static", "int8:tensor:asym:static", "uint8:tensor:asym:static"])
def test_static_inputs(inputs: str) -> None:
    """The value of every int8 level is the same by scale and zero-point there as it is here."""
    parsed = parse_inputs(inputs)
    parts = {"input_scale": torch.tensor([0.25])}
    offset = 0.0
    if parsed.format is not None and parsed.format.offset is not None:
        offset = 3.0 if parsed.format.grid.signed else 131.0
        parts["input_offset"] = torch.tensor([offset])
    found = pack_inputs(parsed, parts)
    lowest = 0.0 if "uint8" in inputs else -128.0
    ours = 0.25 * (torch.arange(256) + lowest - offset)
    zero = found.get("input_zero_point", torch.zeros(1))
    theirs = found["input_scale"] * (torch.arange(-128, 128) - zero.float())
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "fmt", ["int4:g32", "int8:channel", "int3:g32", "int2:g16", "uint4:g32:asym", "uint2:g16:asym", "int8:g32:asym"]
)
def test_gptq(fmt: str) -> None:
    q = quantize_tensor(weight(32, 64), f"minmax@{fmt}" if "asym" in fmt else f"search@{fmt}")
    parts, bits = packed(Gptq(), q), q.format.grid.bits
    less = 0 if "asym" in fmt else 1
    found = torch.empty(q.shape)
    for o in range(q.shape[0]):
        column = parts["qweight"][:, o].tolist()
        for i in range(q.shape[1]):
            g = int(parts["g_idx"][i])
            zero = field(parts["qzeros"][g].tolist(), bits, o) + less
            found[o, i] = float(parts["scales"][g, o]) * (field(column, bits, i) - zero)
    assert float((found - q.dequantize()).norm() / q.dequantize().norm()) <= (0 if ":g" in fmt else 2.0**-11)


@pytest.mark.parametrize("fmt", ["int4:g32", "uint4:g32:asym", "int4:channel"])
def test_awq(fmt: str) -> None:
    q = quantize_tensor(weight(16, 64), f"minmax@{fmt}" if "asym" in fmt else f"absmax@{fmt}")
    parts, place = packed(Awq(), q), (0, 4, 1, 5, 2, 6, 3, 7)
    group = q.shape[1] // parts["scales"].shape[0]
    found = torch.empty(q.shape)
    for o in range(q.shape[0]):
        for i in range(q.shape[1]):
            code = int(parts["qweight"][i, o // 8]) >> (4 * place[o % 8]) & 15
            zero = int(parts["qzeros"][i // group, o // 8]) >> (4 * place[o % 8]) & 15
            found[o, i] = float(parts["scales"][i // group, o]) * (code - zero)
    assert float((found - q.dequantize()).norm() / q.dequantize().norm()) <= (0 if ":g" in fmt else 2.0**-11)


def test_scales_that_fp16_cannot_hold_are_refused() -> None:
    from lowbit.errors import ExportError

    q = quantize_tensor(1e7 * weight(8, 32), "absmax@int4:channel")
    with pytest.raises(ExportError, match="layers.0.up.*too large for fp16.*--as vllm"):
        packed(Gptq(), q)


def test_nvfp4_by_what_readers_make_of_the_reciprocal() -> None:
    """compressed-tensors stores 1 / s; what is read of it, by division or by the reciprocal, is within the tolerance of ours.

    Some float32 s are no reciprocal of a float32: no neighbour of 1 / s gives them back, so that none can be asked for.
    """
    scheme = next(s for s in SCHEMES if s.shares_scale)
    sizes = torch.rand(60, generator=torch.Generator().manual_seed(2)) * 8 - 4
    unreachable = 0
    for i, size in enumerate(sizes.tolist()):
        q = quantize_tensor(weight(4, 32, i) * 2.0**size, "nvfp4")
        parts, ours = packed(Vllm(), q), q.dequantize()
        assert isinstance(q.scale, QTensor) and q.scale.scale is not None
        s, divisor = q.scale.scales().view(1), parts["weight_global_scale"]  # type: ignore[union-attr]
        levels, local = nibble_values(parts["weight_packed"]), parts["weight_scale"].float()
        for read in (local / divisor, local * (1 / divisor)):
            found = levels * read.repeat_interleave(16, 1)
            assert float((found.double() - ours.double()).norm() / ours.double().norm()) <= scheme.changes
        near = [divisor, *(torch.nextafter(divisor, torch.tensor(to)) for to in (0.0, torch.inf))]
        unreachable += not any(torch.equal(1 / each, s) for each in near)
    assert 0 < unreachable < 60 and scheme.changes < 2.5e-7
