"""Causal attention of calibration beside PyTorch's own, and files of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.blockwise import causal_attention
from lowbit.blockwise.causal_attention import attention
from lowbit.blockwise.hidden_states import TensorFile


def operands(tokens: int, shared: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(tokens)
    heads = [4, 4 // shared, 4 // shared]
    return [2 * torch.randn(2, n, tokens, 16, generator=g).bfloat16() for n in heads]


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("tokens", [1, 31, 256, 300, 700])
@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"shared": 2}])
def test_it_is_as_exact_as_the_kernel_it_stands_for(
    tokens: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_attention, "_SCORES", 1 << 17)  # several rounds of heads
    options = dict(options)
    shared = options.pop("shared", 1)
    q, k, v = operands(tokens, shared)
    wide = [t.double().repeat_interleave(4 // t.shape[1], 1) for t in (q, k, v)]
    exact = F.scaled_dot_product_attention(*wide, is_causal=True, **options)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = attention(q.float(), k.float(), v, is_causal=True, enable_gqa=shared > 1, **options)
        usual = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared > 1, **options)
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    assert off(found, exact) < 1.5 * off(usual, exact) + 1e-6  # with scores in bfloat16: twice and more


def test_other_calls_are_left_to_pytorch() -> None:
    q, k, v = operands(40)
    mask = torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) > 0.3
    mask |= torch.eye(40, dtype=torch.bool)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            for given in ({"attn_mask": mask}, {}, {"is_causal": True, "dropout_p": 1.0}):
                assert torch.equal(attention(q, k, v, **given), F.scaled_dot_product_attention(q, k, v, **given))
            short = attention(q[:, :, :8], k, v, is_causal=True)
            assert torch.equal(short, F.scaled_dot_product_attention(q[:, :, :8], k, v, is_causal=True))
        x = [t.float() for t in (q, k, v)]
        assert torch.equal(attention(*x, is_causal=True), F.scaled_dot_product_attention(*x, is_causal=True))


def test_gradients_are_those_of_pytorch() -> None:
    q, k, v = (t.float().requires_grad_() for t in operands(40))
    with torch.autocast("cpu", torch.bfloat16):
        attention(q, k, v, is_causal=True).float().square().sum().backward()
    assert all(t.grad is not None and bool(t.grad.abs().sum() > 0) for t in (q, k, v))


def test_a_file_of_tensors_gives_back_each_as_it_was(tmp_path: Path) -> None:
    file = TensorFile(tmp_path)
    tensors = [torch.randn(3, 4).bfloat16(), torch.zeros(0, 5), torch.arange(6).reshape(2, 3).T, torch.tensor(1.5)]
    assert [file.append(t) for t in tensors] == [0, 1, 2, 3]
    for number in (2, 0, 3, 1):
        found = file.read(number)
        assert torch.equal(found, tensors[number]) and found.dtype == tensors[number].dtype
    file.rewind()
    assert len(file) == 0 and file.append(tensors[0]) == 0 and torch.equal(file.read(0), tensors[0])
    file.remove()
    assert not any(tmp_path.iterdir()) and len(file) == 0
    assert file.append(tensors[2]) == 0 and torch.equal(file.read(0), tensors[2])
