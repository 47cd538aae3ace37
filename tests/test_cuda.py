"""The same code on a GPU. Skipped where there is none."""

from __future__ import annotations

import copy

import pytest
import torch

import lowbit
from lowbit.nn.packed import PackedWeight
from lowbit.recipes.presets import PRESETS
from lowbit.recipes.recipe import Recipe
from tiny import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("preset", PRESETS)
def test_dequantizing_on_the_gpu_gives_the_same_values(preset: str) -> None:
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    q = lowbit.quantize_tensor(weight, preset)
    assert torch.equal(q.to("cuda").dequantize().cpu(), q.dequantize())


@pytest.mark.parametrize("preset", PRESETS)
def test_quantizing_on_the_gpu_is_as_good(preset: str) -> None:
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    recipe = Recipe.parse(preset)
    on_cpu = lowbit.quantize_tensor(weight, recipe).dequantize()
    on_gpu = lowbit.quantize_tensor(weight.cuda(), recipe).dequantize()
    assert on_gpu.is_cuda
    assert relative(on_gpu, weight) == pytest.approx(relative(on_cpu, weight), rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "falcon", "mamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_moves_to_the_gpu(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name).eval()
    packed = lowbit.quantize(model, "w4").model
    dense = lowbit.dequantize(copy.deepcopy(packed)).to("cuda", dtype)
    packed = packed.to("cuda", dtype)
    ids = torch.arange(24, device="cuda")[None] % 100
    with torch.no_grad():
        assert relative(packed(ids).logits, dense(ids).logits) < (1e-5 if dtype == torch.float32 else 2e-2)
    weights = [m for m in packed.modules() if isinstance(m, PackedWeight)]
    assert weights
    assert all(b.is_cuda for w in weights for b in w.buffers())


def test_a_model_on_the_gpu_is_quantized_and_stays_there() -> None:
    model = tiny_model("llama").eval().cuda()
    result = lowbit.quantize(model, "w4", device="cuda")
    assert next(result.model.parameters()).is_cuda
    assert all(b.is_cuda for m in result.model.modules() if isinstance(m, PackedWeight) for b in m.buffers())
    with torch.no_grad():
        assert torch.isfinite(result.model(torch.arange(8, device="cuda")[None]).logits).all()
