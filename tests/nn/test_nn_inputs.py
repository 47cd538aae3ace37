"""A packed weight with quantized inputs, whatever the code around it does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lowbit
from lowbit.errors import FormatError
from lowbit.formats import InputQuantizer, parse_format, parse_inputs, round_inputs
from lowbit.nn.packed import PackedWeight
from lowbit.nn.swap import dequantize_, place
from strategies import normal

FORMS = ["int8:token", "int8:g8", "uint8:token:asym", "int8:token:outliers=2", "int8:tensor:static",
         "uint8:tensor:asym:static:divisor", "int8:token:divisor", "float:divisor", "fp8:token"]  # fmt: skip


def stored(text: str, width: int) -> dict[str, Tensor]:
    made = {"input_scale": lambda s: torch.full(s, 0.1), "input_offset": lambda s: torch.full(s, 120.0),
            "input_divisor": lambda s: torch.linspace(0.5, 2, s[0])}  # fmt: skip
    return {name: made[name](size) for name, (_, size) in parse_inputs(text).parts(width).items()}


def weight(given: str, text: str = "int8:channel", shape: tuple[int, int] = (24, 40), **options: bool) -> PackedWeight:
    q = lowbit.quantize_tensor(normal(shape, 1), text)
    return PackedWeight.of(q, inputs=parse_inputs(given), input_parts=stored(given, shape[1]), **options)


def expected(x: Tensor, w: PackedWeight) -> Tensor:
    """In float64, from the parts: the truth."""
    quantizer = w.quantizer()
    assert quantizer is not None
    return quantizer.round(x.float()).double() @ w.qtensor().dequantize().double().T


def near(a: Tensor, b: Tensor, limit: float = 1e-4) -> bool:
    """Within what two digits of 8 bits cost float activations."""
    return a.shape == b.shape and bool((a.double() - b).norm() <= limit * b.norm())


@pytest.mark.parametrize("kernel", [None, "expand"])
@pytest.mark.parametrize("given", FORMS)
def test_every_way_of_multiplying(given: str, kernel: str | None) -> None:
    w, x, bias = weight(given), normal((2, 3, 40), 2), normal((24,), 3)
    w.dispatcher.only = kernel
    truth = expected(x, w)
    assert near(F.linear(x, w), truth) and near(F.linear(x, w, bias), truth + bias.double())
    assert near(x @ w.T, truth) and near(torch.matmul(x, w.t()), truth)
    turned = weight(given, transposed=True)
    turned.dispatcher.only = kernel
    layer = Conv1D(24, 40)
    layer.bias.data = bias
    place(layer, "weight", turned)
    assert near(layer(x), truth + bias.double()) and near(x @ turned, truth)


def test_the_inputs_are_truly_rounded() -> None:
    x = normal((4, 40), 2)
    for given in ("int8:token", "int8:tensor:static", "fp8:token"):
        w = weight(given)
        far = (F.linear(x, w) - x @ w.dequantize().T).norm() / (x @ w.dequantize().T).norm()
        assert 1e-3 < float(far) < 0.2


def test_looking_up_rows_does_not_touch_inputs() -> None:
    w, index = weight("int8:token"), torch.tensor([[3, 0], [5, 5]])
    assert torch.equal(F.embedding(index, w), w.qtensor().dequantize()[index])
    divided = weight("int8:token:divisor")
    assert torch.equal(F.embedding(index, divided), divided.dequantize()[index])
    assert torch.equal(divided[4], divided.dequantize()[4])


def test_the_dense_weight_has_the_divisor_in_it() -> None:
    w, x = weight("float:divisor"), normal((5, 40), 2)
    d = stored("float:divisor", 40)["input_divisor"]
    assert torch.equal(w.dequantize(), w.qtensor().dequantize() / d)
    assert near(x @ w.dequantize().T, expected(x, w))
    layer = nn.Linear(40, 24, bias=False)
    place(layer, "weight", w)
    y = layer(x)
    dequantize_(layer)
    assert isinstance(layer.weight, nn.Parameter) and near(layer(x), y.double())
    assert near(torch.einsum("ti,oi->to", x, w), y.double())  # code that no handler knows


@pytest.mark.parametrize("given", FORMS)
@pytest.mark.parametrize("turned", [False, True])
def test_gradients_pass_straight_through_the_rounding(given: str, turned: bool) -> None:
    w, x = weight(given, transposed=turned), normal((3, 40), 2).requires_grad_()
    y = x @ w if turned else F.linear(x, w)
    y.square().sum().backward()
    dense = w.dequantize().T if turned else w.dequantize()
    assert x.grad is not None and near(x.grad, (2 * expected(x.detach(), w) @ dense.double()))


def test_types_and_devices_change_no_part() -> None:
    w, x = weight("uint8:tensor:asym:static:divisor"), normal((4, 40), 2)
    layer = nn.Linear(40, 24, bias=False)
    place(layer, "weight", w)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    assert set(before) == {f"weight.{p}" for p in ("codes", "scale", "input_scale", "input_offset", "input_divisor")}
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in layer.state_dict().items())
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert near(layer(x.bfloat16()), expected(x.bfloat16(), layer.weight), 1e-2)


def test_states_and_copies() -> None:
    given, x = "int8:tensor:static", normal((4, 40), 2)
    w = weight(given)
    twin, empty = copy.deepcopy(w), PackedWeight(w.format, w.stored_shape, inputs=parse_inputs(given))
    assert {k: v.shape for k, v in empty.named_buffers()} == {k: v.shape for k, v in w.named_buffers()}
    empty.to_empty(device="cpu")
    empty.load_state_dict(w.state_dict())
    for other in (twin, empty):
        assert torch.equal(F.linear(x, other), F.linear(x, w)) and str(other) == str(w)
    assert "inputs=int8:tensor:static" in str(w)
    F.linear(x, w)
    w.load_state_dict(w.state_dict() | {"input_scale": torch.tensor([[0.2]])})
    assert near(F.linear(x, w), round_inputs(x, w.inputs, torch.tensor([[0.2]])).double() @ w.dequantize().double().T)


def test_parts_that_do_not_fit_are_errors() -> None:
    q = lowbit.quantize_tensor(normal((24, 40), 1), "int8:channel")
    with pytest.raises(FormatError, match="input_scale"):
        PackedWeight.of(q, inputs=parse_inputs("int8:tensor:static"))
    with pytest.raises(FormatError, match="width 40"):
        PackedWeight.of(q, inputs=parse_inputs("float:divisor"), input_parts={"input_divisor": torch.ones(39)})
    with pytest.raises(FormatError, match="inputs of this weight are float"):
        PackedWeight.of(q, input_parts={"input_divisor": torch.ones(40)})
    with pytest.raises(FormatError, match="only a matrix"):
        PackedWeight(parse_format("int8"), (2, 24, 40), inputs=parse_inputs("int8:token"))
    assert PackedWeight.of(q).quantizer() is None
    assert isinstance(weight("int8:token").quantizer(), InputQuantizer)


def test_no_rows_give_none() -> None:
    assert F.linear(torch.zeros(2, 0, 40), weight("int8:token")).shape == (2, 0, 24)
