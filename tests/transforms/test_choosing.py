"""SmoothQuant and AWQ against their formulas by hand and against brute force with the inputs themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.errors import RecipeError, TransformError
from lowbit.formats import parse_format
from lowbit.solvers import Call
from lowbit.solvers.stats import Stats, StatsBuilder
from lowbit.transforms.awq import awq, clip_search
from lowbit.transforms.smooth import mean_square_of_largest, smooth


def quantizer(text: str):  # type: ignore[no-untyped-def]
    fmt = parse_format(text)

    def quantize(weight: Tensor, stats: Stats | None) -> Tensor:
        return Call("rtn")(weight.float(), fmt, Call("absmax"), None).dequantize().to(weight)

    return quantize


def statistics(x: Tensor) -> Stats:
    builder = StatsBuilder(x.shape[1])
    builder.add(x)
    return builder.stats()


def inputs(tokens: int = 200, k: int = 64, seed: int = 0) -> Tensor:
    """Inputs with a few outlier channels, as language models have them, and correlated channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator) @ (torch.eye(k) + 0.2 * torch.randn(k, k, generator=generator))
    size = torch.exp(0.5 * torch.randn(k, generator=generator))
    size[[3, 17, 40]] *= torch.tensor([30.0, 12.0, 20.0])
    return x * size


def weights(k: int = 64, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, k, generator=generator) for n in (32, 48)]


def test_smooth_is_equation_four_by_hand() -> None:
    x = torch.tensor([[1.0, -16.0, 0.0], [-4.0, 9.0, 0.0]])
    w = [torch.tensor([[0.5, 0.25, 1.0]]), torch.tensor([[-0.25, 0.125, 2.0], [0.0, -1.0, 0.0]])]
    got = smooth(w, statistics(x), quantizer("int8:channel"), alpha=0.5)
    # channel 0: sqrt(4) / sqrt(0.5); channel 1: sqrt(16) / sqrt(1); channel 2 has no input
    assert torch.allclose(got.scale, torch.tensor([2 / 0.5**0.5, 4.0, 1.0]), rtol=1e-6) and got.alpha == 0.5
    # with alpha = 0.25 and 1
    got = smooth(w, statistics(x), quantizer("int8:channel"), alpha=0.25)
    assert torch.allclose(got.scale, torch.tensor([4**0.25 / 0.5**0.75, 2.0, 1.0]), rtol=1e-6)
    got = smooth(w, statistics(x), quantizer("int8:channel"), alpha=1.0)
    assert torch.allclose(got.scale, torch.tensor([4.0, 16.0, 1.0]), rtol=1e-6)


def int8_product_error(x: Tensor, ws: list[Tensor], s: Tensor, quantize) -> float:  # type: ignore[no-untyped-def]
    """The true squared error a token of int8 inputs (absmax of each token) times quantized weights."""
    y = x / s
    step = y.abs().amax(1, keepdim=True) / 127
    rounded = (y / step).round() * step
    return sum(float((rounded @ quantize(w * s, None).mT - x @ w.mT).square().sum()) for w in ws) / len(x)


def test_smooth_helps_int8_and_its_search_is_near_the_best_exponent() -> None:
    x, ws, quantize = inputs(), weights(), quantizer("int8:channel")
    stats = statistics(x)
    true = {
        a: int8_product_error(x, ws, smooth(ws, stats, quantize, alpha=a).scale, quantize)
        for a in [i / 10 for i in range(11)]
    }
    plain = int8_product_error(x, ws, torch.ones(64), quantize)
    found = smooth(ws, stats, quantize, points=10)
    assert true[0.5] < 0.5 * plain
    assert true[found.alpha] < 1.1 * min(true.values())
    assert found.error == pytest.approx(true[found.alpha], rel=0.2) and found.plain == pytest.approx(plain, rel=0.2)


def test_the_largest_channel_of_a_token_against_sampling() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp(torch.randn(40, generator=generator))
    y = torch.randn(20000, 40, generator=generator) * spread
    sampled = float(y.abs().amax(1).square().mean())
    assert mean_square_of_largest(spread.square(), float(y.abs().max())) == pytest.approx(sampled, rel=0.02)


def brute_force_awq(x: Tensor, ws: list[Tensor], quantize, points: int) -> list[tuple[float, float]]:  # type: ignore[no-untyped-def]
    """(error, alpha) of every candidate with X itself."""
    out = []
    for i in range(points):
        alpha = i / points
        s = x.abs().mean(0) ** alpha
        s = s / (s.max() * s.min()).sqrt()
        error = sum(float((x @ w.mT - (x / s) @ quantize(w * s, None).mT).square().sum()) for w in ws) / len(x)
        out.append((error, alpha))
    return out


@pytest.mark.parametrize("text", ["int4:g32", "int3:channel", "int4:channel"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_awq_chooses_what_brute_force_with_the_inputs_chooses(text: str, seed: int) -> None:
    x, ws, quantize = inputs(seed=seed), weights(seed=seed + 10), quantizer(text)
    got = awq(ws, statistics(x), quantize)
    tried = brute_force_awq(x, ws, quantize, 20)
    error, alpha = min(tried)
    assert got.alpha == alpha
    assert got.error == pytest.approx(error, rel=1e-3) and got.plain == pytest.approx(tried[0][0], rel=1e-3)
    assert got.error < got.plain
    assert float((got.scale.max() * got.scale.min()).sqrt()) == pytest.approx(1, rel=1e-5)


def test_awq_is_never_worse_than_no_scaling_where_scaling_cannot_help() -> None:
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    got = awq(weights(), statistics(x), quantizer("int4:g32"))
    assert got.error <= got.plain


def test_awq_passes_the_statistics_of_the_scaled_input() -> None:
    x = inputs()
    seen = []

    def quantize(weight: Tensor, stats: Stats) -> Tensor:
        seen.append(stats.second_moment.diagonal())
        return weight.round()

    awq(weights()[:1], statistics(x), quantize, points=2)
    s = x.abs().mean(0).sqrt()
    s = s / (s.max() * s.min()).sqrt()
    assert torch.allclose(seen[0], x.square().mean(0), rtol=1e-5)
    assert torch.allclose(seen[1], (x / s).square().mean(0), rtol=1e-4)


@pytest.mark.parametrize("method", [awq, smooth])
def test_shared_channels_get_one_scale(method) -> None:  # type: ignore[no-untyped-def]
    shared = torch.arange(64) % 32
    got = method(weights(), statistics(inputs()), quantizer("int4:g32"), shared)
    assert torch.allclose(got.scale[:32], got.scale[32:], rtol=1e-6)
    assert len(torch.unique(got.scale)) > 16


@pytest.mark.parametrize("method", [awq, smooth])
def test_dead_channels_and_dead_inputs_keep_finite_scales(method) -> None:  # type: ignore[no-untyped-def]
    x = inputs()
    x[:, 7] = 0
    got = method(weights(), statistics(x), quantizer("int4:g32"))
    assert float(got.scale[7]) == 1 and bool(torch.isfinite(got.scale).all()) and bool((got.scale > 0).all())
    none = method(weights(), statistics(x * 0), quantizer("int4:g32"))
    assert torch.equal(none.scale, torch.ones(64))


def test_clipping_against_brute_force_of_one_group() -> None:
    x, w, quantize = inputs(), weights()[0], quantizer("int3:g32")
    w[4, 2] = 9.0  # an outlier that costs its group its resolution
    stats = statistics(x)
    got = clip_search(w, stats, quantize, 32)
    for row in (0, 4):
        errors = []
        for i in range(11):
            part = w[row : row + 1, :32]
            limit = float(part.abs().max()) * (1 - i / 20)
            clipped = w[row : row + 1].clone()
            clipped[:, :32] = part.clamp(-limit, limit)
            diff = quantize(clipped, None)[:, :32] - part
            errors.append((float((x[:, :32] @ diff.mT).square().sum()), limit))
        assert float(got[row, :32].abs().max()) == pytest.approx(min(errors)[1], rel=1e-5)
    unclipped = float((x @ (quantize(w, None) - w).mT).square().sum())
    assert float((x @ (quantize(got, None) - w).mT).square().sum()) < unclipped
    with pytest.raises(TransformError, match="groups of 48 do not divide 64"):
        clip_search(w, stats, quantize, 48)


def test_options_that_mean_nothing_are_errors() -> None:
    given = (weights(), statistics(inputs()), quantizer("int4:g32"))
    with pytest.raises(RecipeError, match="would be ignored"):
        smooth(*given, alpha=0.7, points=10)
    with pytest.raises(RecipeError, match="bits is 2 or more"):
        smooth(*given, bits=1)
    with pytest.raises(RecipeError, match="leave awq out"):
        awq(*given, points=0)
