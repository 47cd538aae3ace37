"""Products of quantized inputs: every kernel against what the inputs round to, the integers against `integer_matmul`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

import lowbit
from lowbit.errors import RecipeError
from lowbit.formats import InputQuantizer, QTensor, encode, parse_format, parse_inputs, quantize_inputs, round_inputs
from lowbit.kernels import dispatch as registry
from lowbit.kernels import torch_int
from lowbit.kernels.dispatch import Dispatcher, Timings, survey
from lowbit.kernels.integer import integer_matmul
from lowbit.kernels.torch_int import TorchInt
from strategies import normal

ROUNDED = 1e-4  # levels of nf4, held in two tables
CPU = torch.device("cpu")
WEIGHTS = [
    "int8:channel", "int8:g32", "int8:g24", "int8:tensor", "int8:4x16", "uint8:channel:asym", "uint8:g40:zero=fp32",
    "int4:g32", "int4:channel:narrow", "uint4:g16:min=fp16", "uint4:g32:asym", "int3:*x16", "int2:g16", "nf4:g32",
]  # fmt: skip
INPUTS = [
    "int8:token", "int8:g16", "int8:g24", "int8:tensor", "int8:3x16", "int4:token", "uint8:token:asym", "uint8:tensor:asym",
    "uint8:g16:zero=fp32", "int8:token:zero=int32", "int8:token:outliers=2.5", "uint8:g24:asym:outliers=2.5", "fp8:token",
]  # fmt: skip
# Offsets of both sides are taken off sums many times as large as what is left.
LIMITS = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@cache
def packed(text: str, shape: tuple[int, int] = (24, 80)) -> QTensor:
    return lowbit.quantize_tensor(normal(shape, 1, 0.05) + 0.01, text)


def quantizer(text: str) -> InputQuantizer:
    """Of inputs of width 80, with a scale and a divisor where they want one."""
    value = parse_inputs(text)
    made = {"input_scale": 0.02, "input_offset": 100.0, "input_divisor": 0.5}
    parts = {k: torch.full(size, made[k]) for k, (_, size) in value.parts(80).items()}
    return InputQuantizer.of(value, 80, parts)


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def check(q: QTensor, asked: InputQuantizer, x: Tensor, limit: float) -> set[str]:
    """The kernels that accept; AssertionError where one is further than `limit` from the float64 product."""
    bias = normal((q.shape[0],), 5).to(x.dtype)
    rounded = InputQuantizer(asked.inputs, asked.scale, asked.offset, asked.divisor).round(x.float()).double()
    expected, taking = rounded @ q.dequantize().double().T, set()
    for kernel, reason in survey(q, x.dtype, CPU, asked.inputs):
        if reason is not None:
            assert len(reason) > 10 and "\n" not in reason
            continue
        before, form = x.clone(), kernel.prepack(q, x.dtype, asked)
        y = kernel.linear_of_quantized(x, form, None, asked)
        shifted = kernel.linear_of_quantized(x, form, bias, asked)
        assert y.dtype == x.dtype and y.shape == expected.shape and torch.equal(x, before)
        bound = max(limit, ROUNDED) if kernel.name == "packed" and q.format.grid.name == "nf4" else limit
        assert error(y, expected) < bound, (kernel.name, str(q.format), str(asked.inputs))
        assert error(shifted, expected + bias.double()) < bound
        taking.add(kernel.name)
    return taking


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("text", WEIGHTS)
def test_every_kernel_gives_the_product_of_what_inputs_round_to(text: str, given: str) -> None:
    for dtype, limit in LIMITS.items():
        for x in (normal((7, 80), 2).to(dtype), normal((1, 80), 3).to(dtype), normal((5, 160), 4).to(dtype)[:, ::2]):
            taking = check(packed(text), quantizer(given), x, limit)
            assert "expand" in taking and ("torch-int" in taking) == (text != "nf4:g32" and given != "fp8:token")


@pytest.mark.parametrize("given", ["int8:tensor:static", "uint8:tensor:asym:static", "int8:*x16:static:divisor",
                                   "int8:token:divisor", "uint8:tensor:asym:static:outliers=2:divisor"])  # fmt: skip
@pytest.mark.parametrize("text", ["int8:channel", "uint4:g32:asym"])
def test_stored_scales_and_divisors(text: str, given: str) -> None:
    assert "torch-int" in check(packed(text), quantizer(given), normal((6, 80), 2), 1e-6)


def test_a_divisor_alone_leaves_the_kernels_of_float_inputs() -> None:
    taking = check(packed("int8:channel", (16, 80)), quantizer("float:divisor"), normal((6, 80), 2), 1e-4)
    assert taking - {"packed"} == {"expand"}


@pytest.mark.parametrize("given", ["int8:token", "uint8:token:asym", "int8:g16", "uint8:g24:zero=fp32", "int8:tensor"])
@pytest.mark.parametrize("text", [w for w in WEIGHTS if w != "nf4:g32"])
def test_the_integers_are_multiplied_as_the_readable_product_does(text: str, given: str) -> None:
    q, value, x = packed(text), parse_inputs(given), normal((5, 80), 6)
    _, scale, offset = quantize_inputs(x, value)
    a = encode(x, value.format, scale[None], None if offset is None else offset[None])
    kernel = TorchInt()
    found = kernel.linear_of_quantized(x, kernel.prepack(q, x.dtype), None, InputQuantizer(value))
    assert error(found, integer_matmul(a, q).double()) < 3e-6


def test_values_far_from_zero_keep_their_digits() -> None:
    """Codes that are moved down by 128, and minima, must not cost more than float32 does."""
    x = normal((6, 80), 2) + 40
    for text in ("uint8:channel:asym", "uint4:g16:min=fp16"):
        q = lowbit.quantize_tensor(normal((24, 80), 3) + 10, f"minmax@{text}")
        check(q, quantizer("uint8:token:zero=fp32"), x, 1e-6)


def test_sums_too_long_for_int32_are_cut() -> None:
    width = 140_000
    codes = parse_format("int8:channel")
    q = encode(torch.full((2, width), -128.0), codes, torch.ones(1, 2, 1))
    x = torch.full((1, width), -128.0)
    asked = InputQuantizer(parse_inputs("int8:tensor:static"), torch.ones(1, 1))
    kernel = TorchInt()
    form = kernel.prepack(q, x.dtype)
    assert form.cut(width).spans == [(0, 131071), (131071, width)]
    assert float(kernel.linear_of_quantized(x, form, None, asked)[0, 0]) == pytest.approx(128**2 * width, rel=1e-6)


def test_pieces_end_where_a_scale_changes_and_are_made_once() -> None:
    form = TorchInt().prepack(packed("int8:g32"), torch.float32)
    cut = form.cut(24)
    assert [start for start, _ in cut.spans] == [0, 24, 32, 48, 64, 72] and cut.group == [0, 1, 1, 2, 2, 3]
    assert form.cut(24) is cut and cut.scale.shape == (6, 24)
    assert TorchInt().prepack(packed("int8:channel"), torch.float32).cut(80).spans == [(0, 80)]


@pytest.mark.parametrize("given", ["int8:g16", "int8:*x16:static", "uint8:token:asym", "int8:7x16"])
def test_many_rows_go_in_chunks(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_int, "_CHUNK", 1)
    for rows in (32, 33, 70):
        assert "torch-int" in check(packed("int4:g32"), quantizer(given), normal((rows, 80), 2), 3e-6)


def test_reasons() -> None:
    def reason(text: str, given: str | None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
        asked = None if given is None else parse_inputs(given)
        return str({k.name: r for k, r in survey(packed(text), dtype, torch.device(device), asked)}["torch-int"])

    assert "stay float" in reason("int8:channel", None) and "stay float" in reason("int8:channel", "float:divisor")
    assert "e4m3 are none" in reason("int8:channel", "fp8:token") and "integers only" in reason("nf4:g32", "int8:token")
    assert "more than 64 times" in reason("int8:g1", "int8:token") and "cuda" in reason("int8:g8", "int8", "cuda")
    assert "float64" in reason("int8:channel", "int8", dtype=torch.float64)
    assert reason("int8:channel", "int8") == "None"
    with pytest.raises(RecipeError, match="'torch-int' cannot multiply .* stay float"):
        Dispatcher("torch-int").linear(torch.zeros(1, 80), lambda: packed("int8:channel"), None)


@pytest.fixture
def forgotten() -> Iterator[None]:
    torch_int._inexact.cache_clear()
    yield
    torch_int._inexact.cache_clear()


def test_a_cpu_whose_products_overflow_is_found_out(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    def saturating(a: Tensor, b: Tensor) -> Tensor:
        pairs = (a.int()[:, :, None] * b.int()[None]).unflatten(1, (-1, 2)).sum(2)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(1, dtype=torch.int32)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert "overflow" in str(TorchInt().declines(packed("int8:channel"), torch.float32, CPU))
    torch_int._inexact.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (_ for _ in ()).throw(RuntimeError("not built in\nmore")))
    assert "does not work here: not built in" in str(TorchInt().declines(packed("int8:channel"), torch.float32, CPU))
    torch_int._inexact.cache_clear()
    monkeypatch.delattr(torch, "_int_mm")
    assert "has no _int_mm" in str(TorchInt().declines(packed("int8:channel"), torch.float32, CPU))


def test_timings_are_kept_apart_by_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(kernels: list[registry.Kernel], q: QTensor, x: Tensor, asked: object) -> dict[str, float]:
        fast = "expand" if asked is None else "torch-int"
        return {k.name: 1.0 if k.name == fast else 2.0 for k in kernels}

    monkeypatch.setattr(registry, "_measure", measure)
    timings, q = Timings(), packed("int8:channel", (32, 64))
    assert timings.choose(q, torch.float32, CPU, 8) == "expand"
    assert timings.choose(q, torch.float32, CPU, 8, InputQuantizer(parse_inputs("int8:token"))) == "torch-int"
    assert timings.choose(q, torch.float32, CPU, 8) == "expand"


@pytest.mark.parametrize("only", [None, "expand", "torch-int", "torch-int8"])
def test_the_dispatcher_keeps_shapes(only: str | None) -> None:
    q, asked = packed("int8:channel", (24, 64)), InputQuantizer(parse_inputs("int8:token"))
    dispatcher = Dispatcher(only)
    for lead in ((), (3,), (2, 5), (0,), (40,)):
        x = normal((*lead, 64), 3)
        y = dispatcher.linear(x, lambda: q, torch.ones(24), asked)
        assert y.shape == (*lead, 24)
        if x.numel():
            expected = round_inputs(x, asked.inputs).double() @ q.dequantize().double().T + 1
            assert error(y, expected) < 1e-5
    assert only is None or {kernel.name for kernel, _ in dispatcher.chosen.values()} == {only}
