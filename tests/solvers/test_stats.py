"""Statistics of inputs: by the C++ part and by PyTorch, both against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.kernels.bfloat16 import multiplies_bfloat16
from lowbit.solvers import stats
from lowbit.solvers.stats import Stats, StatsBuilder


def off(found: Tensor | None, exact: Tensor) -> float:
    assert found is not None
    return float((found.double() - exact).norm() / exact.norm())


def inputs(width: int) -> tuple[list[Tensor], list[Tensor]]:
    """Micro-batches of a quantized model's input with channels of very different size, and of the float model's."""
    g = torch.Generator().manual_seed(width)
    size = torch.logspace(-2, 2, width)
    x = [size * torch.randn(n, width, generator=g) for n in (300, 1, 71)]
    return x, [part + 0.1 * size * torch.randn(part.shape, generator=g) for part in x]


def built(width: int, half: bool, kind: torch.dtype) -> Stats:
    builder = StatsBuilder(width, drift=True, half=half)
    for x, x_float in zip(*inputs(width)):
        builder.add(x[None].to(kind), x_float.to(torch.bfloat16))
    return builder.stats()


@pytest.mark.parametrize("width", [1, 30, 48, 130])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("core", [False, True])
def test_moments_are_those_of_float64(width: int, half: bool, core: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if core and not multiplies_bfloat16():
        pytest.skip("a processor that does not multiply bfloat16, or no C++ part")
    monkeypatch.setattr(stats, "multiplies_bfloat16", lambda: core)
    found = built(width, half, torch.float32)
    x, x_float = (torch.cat(parts) for parts in inputs(width))
    exact = (x.bfloat16() if half else x).double()
    change = x_float.bfloat16().double() - exact
    n = len(exact)
    assert found.tokens == n
    assert off(found.second_moment, exact.T @ exact / n) < 1e-6
    assert torch.equal(found.second_moment, found.second_moment.T)
    assert off(found.drift, change.T @ exact / n) < (4e-3 if half else 1e-5)
    assert torch.equal(found.absmax.double(), exact.abs().amax(0))
    assert off(found.mean_abs, exact.abs().mean(0)) < 1e-6
    # A second moment of rounded sums would have eigenvalues below zero.
    scale = found.second_moment.diagonal().rsqrt()
    assert float(torch.linalg.eigvalsh((scale[:, None] * found.second_moment * scale).double()).min()) > 0.05


def test_the_number_of_threads_changes_no_byte_of_the_moments() -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(built(130, True, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].second_moment, found[1].second_moment)
    assert torch.equal(found[0].absmax, found[1].absmax)
    if multiplies_bfloat16():  # what PyTorch sums may depend on them
        assert found[0].drift is not None and found[1].drift is not None
        assert torch.equal(found[0].drift, found[1].drift)
        assert torch.equal(found[0].mean_abs, found[1].mean_abs)
