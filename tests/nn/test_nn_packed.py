"""A packed weight answers like the dense one, whatever the code around it does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lowbit
from lowbit.errors import FormatError, SourceError
from lowbit.formats import QTensor, parse_format
from lowbit.nn.packed import PackedWeight
from lowbit.nn.swap import dequantize_, owner_of, packed_weights, place, swap
from tiny import tiny_model

FORMATS = ["int4:g32", "uint4:g32:asym", "int8:channel", "int3:g16", "nf4:g64:s=(uint8:g32:s=fp32)", "mxfp4", "nvfp4",
           "kmeans4:channel", "ternary:g20", "uint5:g7:min=fp16", "int8:*x16"]  # fmt: skip


def weight(text: str, shape: tuple[int, ...] = (24, 40), transposed: bool = False, **options: Any) -> PackedWeight:
    """A packed weight whose stored shape is [..., out, in] = `shape`."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(text)))
    return PackedWeight.of(lowbit.quantize_tensor(x, text), transposed=transposed, **options)


def near(a: Tensor, b: Tensor, limit: float = 1e-4) -> bool:
    """Within what two digits of 8 bits cost float activations."""
    return a.shape == b.shape and a.dtype == b.dtype and bool((a - b).norm() <= limit * b.norm())


def given(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("text", FORMATS)
def test_every_way_of_multiplying(text: str) -> None:
    w = weight(text)
    dense, x, bias = w.dequantize(), given(2, 3, 40), given(24)
    flat = x.view(-1, 40)
    expected = x @ dense.T
    assert near(F.linear(x, w), expected) and near(F.linear(x, w, bias), expected + bias)
    assert near(F.linear(input=x, weight=w, bias=bias), expected + bias)
    for product in (x @ w.T, x @ w.t(), torch.matmul(x, w.T), x.matmul(w.T), torch.matmul(x, w.transpose(0, 1))):
        assert near(product, expected)
    assert near(torch.mm(flat, w.t()), flat @ dense.T)
    assert near(torch.addmm(bias, flat, w.t()), flat @ dense.T + bias)
    assert near(torch.addmm(bias, flat, w.t(), beta=0.5, alpha=2), 0.5 * bias + 2 * flat @ dense.T)
    assert near(torch.einsum("bti,oi->bto", x, w), expected)
    assert near(w @ flat.T, dense @ flat.T) and near(x[0, 0] @ w.T, x[0, 0] @ dense.T)
    assert near(F.linear(x[0, 0], w), dense @ x[0, 0]) and near(w.mv(x[0, 0]), dense @ x[0, 0])
    assert near(F.linear(x[:0], w, bias), expected[:0] + bias)
    assert near(w * 2.0, dense * 2) and near(w + 1, dense + 1) and near(2.0 * w, dense * 2)


@pytest.mark.parametrize("text", FORMATS)
def test_conv1d_keeps_its_weight_the_other_way_round(text: str) -> None:
    w = weight(text, transposed=True)
    dense, x, bias = w.dequantize(), given(5, 40), given(24)
    assert tuple(w.shape) == tuple(dense.shape) == (40, 24) and w.stored_shape == (24, 40)
    assert near(torch.addmm(bias, x, w), x @ dense + bias)
    assert near(torch.addmm(bias, x, w, beta=2, alpha=3), 2 * bias + 3 * x @ dense)
    assert near(x @ w, x @ dense) and near(torch.matmul(x, w), x @ dense) and near(torch.mm(x, w), x @ dense)
    assert near(F.linear(given(5, 24), w), given(5, 24) @ dense.T)
    assert near(x[:, :24] @ w.T, x[:, :24] @ dense.T)
    assert near(w[torch.tensor([3, 1])], dense[[3, 1]]) and near(w[2], dense[2])
    assert near(F.embedding(torch.tensor([[3], [1]]), w), dense[[3, 1]][:, None])
    layer = Conv1D(24, 40)
    place(layer, "weight", w)
    assert near(layer(x.view(1, 5, 40)), x.view(1, 5, 40) @ dense + layer.bias)


@pytest.mark.parametrize("text", FORMATS)
def test_rows_by_every_kind_of_index(text: str) -> None:
    w = weight(text, (48, 40))
    dense = w.dequantize()
    ids = torch.tensor([[0, 47, 3], [3, 3, 20]])
    assert torch.equal(F.embedding(ids, w), dense[ids]) and torch.equal(F.embedding(ids, w, 3), dense[ids])
    assert torch.equal(F.embedding(ids.to(torch.int32), w), dense[ids])
    assert torch.equal(torch.embedding(w, ids), dense[ids])
    for index in (5, -1, ids, ids[0], torch.tensor(7), torch.tensor(-2), slice(3, 9), slice(None, None, 5), [1, 2, -3],
                  (slice(2, 4), slice(1, 7)), (3, 5), None, ..., ids - 48, dense[:, 0] > 0, ids[:0]):  # fmt: skip
        assert torch.equal(w[index], dense[index]), index
    for outside in (48, -49, torch.tensor([48])):
        with pytest.raises(IndexError):
            w[outside]
    assert len(w) == 48 and [row.shape[0] for row in w] == [40] * 48


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("text", FORMATS)
def test_experts(text: str, transposed: bool) -> None:
    w = weight(text, (3, 24, 40), transposed)
    dense, x = w.dequantize(), given(5, 24 if transposed is False else 40)
    assert (
        tuple(w.shape) == tuple(dense.shape) == ((3, 40, 24) if transposed else (3, 24, 40)) and w.ndim == w.dim() == 3
    )
    for index in (0, 2, -1, torch.tensor(1), torch.tensor([2, 0]), slice(1, 3)):
        assert torch.equal(w[index], dense[index]), index
    assert near(x @ w[1], x @ dense[1])
    assert near(F.linear(given(5, dense.shape[2]), w[1]), given(5, dense.shape[2]) @ dense[1].T)
    batch = x.expand(3, *x.shape)
    assert near(torch.bmm(batch, w), torch.bmm(batch, dense)) and near(batch @ w, batch @ dense)
    assert near(torch.einsum("ti,eio->teo", x, w), torch.einsum("ti,eio->teo", x, dense))
    other = given(3, 5, dense.shape[2])
    assert near(torch.bmm(other, w.transpose(1, 2)), torch.bmm(other, dense.transpose(1, 2)))
    assert near(other @ w.mT, other @ dense.mT) and near(torch.matmul(other, w.transpose(-1, -2)), other @ dense.mT)


def test_it_looks_like_the_dense_weight() -> None:
    w = weight("int4:g32", dtype=torch.bfloat16)
    dense = w.dequantize()
    assert (w.shape, w.dtype, w.device, w.ndim) == (dense.shape, dense.dtype, dense.device, dense.dim())
    assert w.size() == dense.size() and w.size(0) == 24 and w.numel() == dense.numel()
    assert not w.requires_grad and w.is_floating_point() and torch.is_floating_point(w)
    assert torch.equal(w.data, dense) and torch.equal(w.detach(), dense) and torch.equal(w.abs(), dense.abs())
    assert "int4:g32" in repr(w) and "bfloat16" in repr(w)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = w.nonsense
    assert not hasattr(w, "_nonsense") and not hasattr(w, "bias")


def test_casts_and_copies_keep_the_parts() -> None:
    w = weight("nf4:g64:s=(uint8:g32:s=fp32)")
    parts = {k: v.clone() for k, v in w.qtensor().parts().items()}
    holder = nn.Linear(1, 1)
    place(holder, "weight", w)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        holder.to(dtype)
        assert w.dtype == w.dequantize().dtype == dtype
        for same in (w, copy.deepcopy(w)):
            assert {k: v.dtype for k, v in same.qtensor().parts().items()} == {k: v.dtype for k, v in parts.items()}
            assert all(torch.equal(v, parts[k]) for k, v in same.qtensor().parts().items())
    assert set(w.state_dict()) == set(parts) == {"codes", "scale.codes", "scale.scale"}
    assert holder.to("meta").weight.device.type == "meta"


def test_code_that_casts_its_weight_gets_a_tensor_and_changes_nothing() -> None:
    w = weight("int4:g32", dtype=torch.bfloat16)
    exact = w.qtensor().dequantize()
    for cast in (w.float(), w.to(torch.float32), w.to("cpu", torch.float32), w.to(exact), w.to(dtype=torch.float32)):
        assert isinstance(cast, torch.Tensor) and torch.equal(cast, exact)
    assert torch.equal(w.double(), exact.double()) and torch.equal(w.half(), exact.half())
    assert torch.equal(w.type(torch.float64), w.dequantize().double())
    assert w.dtype == torch.bfloat16 and w.to(torch.bfloat16) is w and w.to("cpu") is w and w.bfloat16() is w


def test_empty_weights_take_a_state_dict() -> None:
    full = weight("uint4:g32:asym")
    empty = PackedWeight(full.format, full.stored_shape)
    assert empty.device.type == "meta" and tuple(empty.shape) == (24, 40)
    empty.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(empty.dequantize(), full.dequantize())
    broken = {k: v for k, v in full.qtensor().parts().items() if k != "scale"}
    with pytest.raises(FormatError, match="scale"):
        PackedWeight(full.format, full.stored_shape, broken).qtensor()


def test_loading_other_values_is_seen_by_the_next_product() -> None:
    w, other, x = weight("int8:channel", (24, 64)), weight("int8:channel", (24, 64)), given(1, 64)
    w.dispatcher.only = "torch-int8"  # which keeps a form of its own
    other.get_buffer("scale").mul_(3)
    before = F.linear(x, w)
    w.load_state_dict(other.state_dict())
    assert near(F.linear(x, w), 3 * before)


def test_swap_ties_and_dequantize_unties_nothing() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(24, 40), "head": nn.Linear(40, 24, bias=False)})
    w = weight("int8:channel")
    swap(model, {"embed.weight": w}, {"head.weight": "embed.weight"})
    assert model["head"].weight is model["embed"].weight is w
    assert [name for name, _ in packed_weights(model)] == ["embed.weight"]
    dense = dequantize_(model)
    assert dense is model and dense["head"].weight is dense["embed"].weight
    assert isinstance(dense["head"].weight, nn.Parameter) and torch.equal(dense["head"].weight, w.dequantize())


def test_a_wrong_place_is_named() -> None:
    with pytest.raises(SourceError, match="no module 'no.such'"):
        owner_of(nn.Linear(2, 2), "no.such.weight")
    with pytest.raises(SourceError, match="no parameter 'wait'"):
        place(nn.Linear(2, 2), "wait", weight("int8:channel"))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_compiled_it_says_the_same(name: str) -> None:
    model = lowbit.quantize(tiny_model(name), "search@int4:g32").model
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        assert near(compiled(ids).logits, expected) and near(compiled(ids).logits, expected)


@pytest.mark.parametrize("kernel", ["expand", "torch-int8"])
def test_gradients_reach_the_inputs(kernel: str) -> None:
    w, x, bias = weight("int8:channel", (24, 64)), given(3, 64).requires_grad_(), given(24).requires_grad_()
    w.dispatcher.only = kernel
    F.linear(x, w, bias).square().sum().backward()
    y = x.detach() @ w.dequantize().T + bias.detach()
    assert x.grad is not None and near(x.grad, 2 * y @ w.dequantize())
    assert bias.grad is not None and near(bias.grad, 2 * y.sum(0))
    with torch.no_grad():
        assert not F.linear(x, w, bias).requires_grad


def test_a_format_and_its_parts_make_a_weight_of_their_own() -> None:
    fmt = parse_format("int4:g32")
    parts = {k: torch.zeros(s, dtype=d) for k, (d, s) in fmt.parts((4, 32)).items()}
    assert torch.equal(PackedWeight(fmt, (4, 32), parts).dequantize(), torch.zeros(4, 32))
    assert isinstance(PackedWeight(fmt, (4, 32), parts).qtensor(), QTensor)


def test_what_a_product_gives_may_be_written_to_while_gradients_are_recorded() -> None:
    weight = lowbit.quantize_tensor(torch.randn(6, 32, generator=torch.Generator().manual_seed(0)), "int8:channel")
    x = torch.randn(2, 3, 32, requires_grad=True)
    y = torch.nn.functional.linear(x, PackedWeight.of(weight))
    y += 1
    y.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad[0, 0], weight.dequantize().sum(0), rtol=1e-4, atol=1e-5)
