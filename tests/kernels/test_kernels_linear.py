"""Every kernel against the product in double precision, on every shape and format that it claims to take."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lowbit
from lowbit.errors import RecipeError
from lowbit.formats import QTensor, parse_format
from lowbit.kernels import dispatch as registry
from lowbit.kernels.core import why_absent
from lowbit.kernels.dispatch import Dispatcher, Timings, all_kernels, bucket, survey

CPU = torch.device("cpu")
FORMATS = [
    "int8:channel", "int8:channel:narrow", "int8:g32", "int8:g40", "int8:g128:s=e4m3", "int8:g32:s=(uint8:g32:s=fp32)",
    "int4:g32", "int4:g128", "int4:g256", "int4:g32:narrow", "uint4:g32:asym", "uint4:g32:min=fp16", "uint4:g64:zero=fp16",
    "uint4:g32:zero=int32", "uint4:g32:s=(uint6:g8):min=(int6:g8)", "uint8:channel:asym", "int3:g16", "nf4:g32",
]  # fmt: skip
SHAPES = [(1, 1), (1, 32), (16, 32), (17, 33), (48, 256), (64, 96), (16, 100), (33, 512), (16, 8)]
# Rounding of the weights and of the result to each type; sums are longer than one rounding.
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
PACKED_OR_EXPAND = "expand" if why_absent() else "packed"
TWO_DIGITS = 1e-4  # two digits of 8 bits stand for float activations


def limit(kernel: registry.Kernel, dtype: torch.dtype) -> float:
    return max(LIMITS[dtype], TWO_DIGITS if kernel.name == "packed" else 0)


@cache
def packed(text: str, shape: tuple[int, int], spread: float = 0.05) -> QTensor:
    """Random weights, away from zero where the format has an offset."""
    offset = parse_format(text).offset is not None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) * spread + 0.3 * spread * offset
    return lowbit.quantize_tensor(x, text if "kmeans" in text else f"{'minmax' if offset else 'absmax'}@{text}")


def truth(x: Tensor, q: QTensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ q.dequantize().double().T
    return y if bias is None else y + bias.double()


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


def inputs(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn((rows, width), generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("text", FORMATS)
def test_every_kernel_that_accepts_gives_the_product(text: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        q = packed(text, shape)
        dense, many, bias = q.dequantize().double(), inputs(33, 2 * shape[1], dtype), inputs(1, shape[0], dtype)[0]
        for kernel, reason in survey(q, dtype, CPU):
            if reason is not None:
                assert len(reason) > 10 and "\n" not in reason
                continue
            form = kernel.prepack(q, dtype)
            for x in (many[:1, : shape[1]], many[:5, ::2], many[:, : shape[1]].contiguous()):
                before = x.clone(), bias.clone()
                y, shifted = kernel.linear(x, form, None), kernel.linear(x, form, bias)
                assert y.dtype == dtype and tuple(y.shape) == (x.shape[0], shape[0])
                expected = x.double() @ dense.T
                assert error(y, expected) < limit(kernel, dtype), (kernel.name, shape, x.shape)
                assert error(shifted, expected + bias) < limit(kernel, dtype), (kernel.name, shape, x.shape)
                assert torch.equal(x, before[0]) and torch.equal(bias, before[1])


@pytest.mark.parametrize("spread", [1e-5, 1e-3, 1.0, 300.0])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("text", ["int8:channel", "int8:g32:s=fp32", "int4:g32:s=fp32", "uint4:g32:s=fp32:min=fp32"])
def test_no_size_of_weights_costs_more_than_it_does_the_reference(text: str, dtype: torch.dtype, spread: float) -> None:
    q, x = packed(text, (32, 128), spread), inputs(3, 128, dtype)
    errors = {}
    for kernel, reason in survey(q, dtype, CPU):
        if reason is None:
            errors[kernel] = error(kernel.linear(x, kernel.prepack(q, dtype), None), truth(x, q))
    reference = errors[max(errors, key=lambda kernel: kernel.name == "expand")]
    assert all(e <= max(2.5 * reference, limit(kernel, dtype)) for kernel, e in errors.items()), (errors, reference)


def test_which_kernel_takes_what() -> None:
    def taking(text: str, shape: tuple[int, int] = (32, 256), dtype: torch.dtype = torch.bfloat16) -> set[str]:
        return {k.name for k, reason in survey(packed(text, shape), dtype, CPU) if reason is None} - {"packed"}

    assert taking("int8:channel") == taking("int8:g32") == taking("int8:g96") == {"torch-int8", "expand"}
    # A width that its vectors do not divide makes PyTorch's operator read beyond its input.
    assert taking("int8:g100") == taking("int8:channel", (32, 100)) == taking("int8:g32", (32, 40)) == {"expand"}
    assert taking("int4:g32") == taking("uint4:g64:asym") == taking("uint4:g32:min=fp16") == {"torch-int4", "expand"}
    for text in (
        "int8:tensor",
        "int8:channel:asym",
        "uint8:channel:asym",
        "int4:channel",
        "int4:g16",
        "int3:g32",
        "nf4:g32",
    ):
        assert taking(text) == {"expand"}
    assert taking("int8:g32", (4, 4128)) == taking("int4:g32", (17, 256)) == taking("int4:g32", (32, 100)) == {"expand"}
    assert taking("int8:channel", dtype=torch.float64) == {"expand"}


def test_reasons_say_what_is_wrong() -> None:
    q = packed("int8:channel", (16, 32))
    reasons = {k.name: r for k, r in survey(q, torch.float32, torch.device("cuda"))}
    assert "CPU" in str(reasons["torch-int8"]) and "4-bit" in str(reasons["torch-int4"]) and reasons["expand"] is None
    assert "float64" in str({k.name: r for k, r in survey(q, torch.float64, CPU)}["torch-int8"])
    assert all_kernels()[-1].name == "expand" and len({k.name for k in all_kernels()}) == len(all_kernels())


def test_the_fastest_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, asked = packed("int8:channel", (32, 64)), []

    def measure(kernels: list[registry.Kernel], q: QTensor, x: Tensor, *others: object) -> dict[str, float]:
        asked.append(x.shape[0])
        one = {"packed": 3.0, "torch-int8": 1.0, "expand": 2.0}
        return {k.name: one[k.name] if x.shape[0] == 1 else 4.0 - one[k.name] for k in kernels}

    monkeypatch.setattr(registry, "_measure", measure)
    timings = Timings()
    assert timings.choose(q, torch.float32, CPU, 1) == timings.choose(q, torch.float32, CPU, 1) == "torch-int8"
    assert timings.choose(q, torch.float32, CPU, 20) == timings.choose(q, torch.float32, CPU, 32) == PACKED_OR_EXPAND
    assert asked == [1, 32]
    learned = packed("kmeans4:channel", (32, 64))
    assert timings.choose(learned, torch.float32, CPU, 1) == "expand" and len(asked) == 2
    assert [bucket(n) for n in (1, 2, 4, 5, 32, 33, 5000)] == [1, 4, 4, 32, 32, 256, 256]


def test_noise_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    q = packed("int8:channel", (32, 64))
    first = next(k.name for k, reason in survey(q, torch.float32, CPU) if reason is None)
    for slower, chosen in ((1.05, first), (1.5, "expand")):
        measured = {k.name: slower for k in all_kernels()} | {"expand": 1.0}
        monkeypatch.setattr(registry, "_measure", lambda *_, measured=measured: measured)
        assert Timings().choose(q, torch.float32, CPU, 1) == chosen


def test_kernels_take_turns_and_slow_ones_are_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(registry.Kernel):
        def __init__(self, name: str, seconds: float) -> None:
            self.name, self.seconds = name, seconds

        def declines(self, *_: object) -> None:
            return None

        def prepack(self, *_: object) -> None:
            return None

        def linear(self, x: Tensor, packed: object, bias: object) -> Tensor:
            calls.append(self.name)
            clock[0] += self.seconds
            return x

    clock = [0.0]
    monkeypatch.setattr(registry, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    calls: list[str] = []
    kernels = [Counting("quick", 1e-4), Counting("slow", 2e-2), Counting("other", 1e-4)]
    seconds = registry._measure(kernels, packed("int8:channel", (32, 64)), torch.zeros(1, 64))
    assert calls == ["quick", "slow", "other"] + ["quick", "other"] * 5
    assert seconds == pytest.approx({"quick": 1e-4, "slow": 2e-2, "other": 1e-4})


@pytest.mark.parametrize("only", [None, "expand", "torch-int8"])
def test_the_dispatcher_keeps_shapes(only: str | None) -> None:
    q = packed("int8:channel", (24, 64))
    dispatcher = Dispatcher(only)
    for lead in ((), (3,), (2, 5), (0,), (2, 0, 3), (40,)):
        x = torch.randn(*lead, 64)
        y = dispatcher.linear(x, lambda: q, torch.ones(24))
        assert y.shape == (*lead, 24)
        if x.numel():
            assert error(y, truth(x, q, torch.ones(24))) < TWO_DIGITS
    used = {kernel.name for kernel, _ in dispatcher.chosen.values()}
    assert only is None or used == {only}


def test_a_kernel_that_cannot_is_an_error() -> None:
    q = packed("int4:g32", (24, 64))
    with pytest.raises(RecipeError, match=r"'torch-int8' cannot multiply with a int4:g32 .*symmetric|8-bit"):
        Dispatcher("torch-int8").linear(torch.zeros(1, 64), lambda: q, None)
    with pytest.raises(RecipeError, match="unknown kernel 'expend'; did you mean 'expand'"):
        Dispatcher("expend").linear(torch.zeros(1, 64), lambda: q, None)


def test_copies_do_not_carry_prepacked_forms() -> None:
    q, x = packed("int8:channel", (24, 64)), torch.randn(2, 64)
    dispatcher = Dispatcher("torch-int8")
    dispatcher.linear(x, lambda: q, None)
    assert dispatcher.packed
    for other in (copy.deepcopy(dispatcher), pickle.loads(pickle.dumps(dispatcher))):
        assert other.only == "torch-int8" and not other.packed and not other.chosen


def test_float16_does_not_lose_small_scales() -> None:
    q = packed("int8:channel", (32, 256), spread=3e-5)
    x = inputs(4, 256, torch.float16) * 100
    expected = truth(x, q)
    dense = F.linear(x, q.dequantize(torch.float16))
    for kernel, reason in survey(q, torch.float16, CPU):
        if reason is None:
            found = error(kernel.linear(x, kernel.prepack(q, torch.float16), None), expected)
            assert found <= 1.5 * error(dense, expected) + 1e-3, kernel.name
