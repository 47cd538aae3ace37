"""Scales pass from producers to consumers without changing the function, and statistics follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from variants import FAMILIES, family_source, random_source

from lowbit.errors import TransformError
from lowbit.interchange.source import Source
from lowbit.transforms.arch import Arch, Norm, arch_of, channels, shared_channels
from lowbit.transforms.check import in_float64, logits
from lowbit.transforms.fold import fold
from lowbit.transforms.rotate import rotate
from lowbit.transforms.scale import apply_scale, equal_where_shared
from lowbit.transforms.transformed import Edit, TransformedSource


class Replaced(Source):
    """A source with some tensors replaced."""

    def __init__(self, inner: Source, tensors: dict[str, Tensor]) -> None:
        self.inner, self.replaced = inner, tensors
        self.label, self.config, self.tensors, self.inventory = (
            inner.label,
            inner.config,
            inner.tensors,
            inner.inventory,
        )

    def read(self, name: str) -> Tensor:
        return self.replaced[name] if name in self.replaced else self.inner.read(name)

    def identity(self) -> dict[str, Any]:
        return {}

    def save_assets(self, out: Any) -> None: ...

    def tokenizer(self) -> Any: ...


def random_scale(size: int, seed: int) -> Tensor:
    return torch.exp(torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def scaled_everywhere(source: Source, arch: Arch) -> dict[str, Tensor]:
    """Every point of a model scaled at random, one after the other. A tied head cannot be scaled and is left out."""
    now: dict[str, Tensor] = {name: source.read(name) for name in source.tensors}
    for i, point in enumerate(arch.points):
        if any(name in arch.tied for name in point.consumers):
            continue
        first = channels(now[point.consumers[0]], arch, point.consumers[0])
        scale = equal_where_shared(random_scale(first.shape[-1], i), shared_channels(point))
        names = (*point.producers, *point.consumers)
        done, applied = apply_scale(arch, point, {n: now[n] for n in names}, scale)
        assert torch.allclose(applied, scale, rtol=1e-12)
        assert all(done[n].shape == now[n].shape for n in names)
        assert not any(torch.equal(done[n], now[n]) for n in names if now[n].any())  # folding leaves biases of zero
        now |= done
    return now


@pytest.mark.parametrize("before", ["as it is", "folded", "rotated"])
@pytest.mark.parametrize("name", FAMILIES)
def test_scaling_every_point_keeps_the_function(name: str, before: str) -> None:
    source = family_source(name)
    arch = arch_of(source)
    options = {"r1": int(not arch.post_norms), "r4": int(bool(arch.seconds))}
    given = {"as it is": lambda s: s, "folded": lambda s: fold(s, head=1), "rotated": lambda s: rotate(s, **options)}[
        before
    ](source)
    arch = arch_of(given)
    after = Replaced(given, scaled_everywhere(given, arch))
    one = logits(source, tokens=16, seed=0)
    two = logits(after, tokens=16, seed=0, online=getattr(given, "online", None))
    assert float((one - two).norm() / one.norm()) < 1e-10


def test_an_online_rotation_closes_the_way_for_scales() -> None:
    source = family_source("llama")
    assert any("up_proj" in link.producer for link in arch_of(source).links)
    assert not any("up_proj" in link.producer for link in arch_of(rotate(source, r4=1)).links)


def test_scales_that_differ_where_one_row_makes_both_are_an_error() -> None:
    source = family_source("llama")
    arch = arch_of(source)
    link = next(link for link in arch.links if link.is_values)
    tensors = {n: source.read(n) for n in (*link.producers, *link.consumers)}
    with pytest.raises(TransformError, match=r"o_proj.*one row have different scales"):
        apply_scale(arch, link, tensors, random_scale(32, 0))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(TransformError, match="positive and finite"):
            apply_scale(arch, link, tensors, torch.full((32,), bad))


def test_shared_scales_are_geometric_means_of_the_repeated_heads() -> None:
    arch = arch_of(family_source("llama"))
    link = next(link for link in arch.links if link.is_values)
    scale = random_scale(32, 1)
    got = equal_where_shared(scale, shared_channels(link))
    for c in range(32):  # four query heads of eight, two value heads
        head, j = c // 8, c % 8
        partner = (head ^ 1) * 8 + j
        assert float(got[c]) == pytest.approx(float((scale[c] * scale[partner]) ** 0.5), rel=1e-12)
    assert torch.equal(equal_where_shared(scale, None), scale)


@pytest.mark.parametrize("name", ["llama", "gemma", "phi"])
def test_consumers_take_over_the_rounding_of_a_norm(name: str) -> None:
    """In bfloat16 a norm's weight moves by up to 2^-9; the applied scale makes gamma' * s' the old gamma again."""
    source = random_source(FAMILIES[name](), dtype=torch.bfloat16)
    arch = arch_of(source)
    norm = next(point for point in arch.points if isinstance(point, Norm))
    tensors = {n: source.read(n) for n in (*norm.producers, *norm.consumers)}
    wanted = random_scale(32, 2).float()
    done, applied = apply_scale(arch, norm, tensors, wanted)
    one = 1.0 if norm.plus_one else 0.0
    before, after = tensors[norm.weight].double() + one, done[norm.weight].double() + one
    assert torch.allclose(after * applied.double(), before, rtol=1e-6)
    assert done[norm.weight].dtype == torch.bfloat16
    assert 0 < float((applied / wanted - 1).abs().max()) < (0.2 if norm.plus_one else 2**-8)


def test_a_channel_that_the_norm_silences_keeps_its_scale() -> None:
    source = family_source("llama")
    arch = arch_of(source)
    norm = arch.norms[0]
    tensors = {n: source.read(n).clone() for n in (*norm.producers, *norm.consumers)}
    tensors[norm.weight][5] = 0
    done, applied = apply_scale(arch, norm, tensors, torch.full((32,), 3.0))
    assert float(applied[5]) == 1 and float(applied[4]) == pytest.approx(3)
    reader = norm.readers[0]
    assert torch.equal(done[reader][:, 5], tensors[reader][:, 5])


def test_without_a_producer_the_columns_are_scaled_and_the_caller_divides() -> None:
    source = family_source("gpt2")
    arch = arch_of(source)
    name = "transformer.h.0.mlp.c_proj.weight"  # stored [in, out], behind GELU
    assert arch.point_for([name]) is None
    scale = random_scale(128, 3)
    done, applied = apply_scale(arch, None, {name: source.read(name)}, scale)
    assert torch.equal(applied, scale) and done[name].is_contiguous()
    x = torch.randn(7, 128, dtype=torch.float64)
    assert torch.allclose((x / scale) @ done[name], x @ source.read(name), rtol=1e-10)


def test_float64_mode_reaches_what_models_cast() -> None:
    x = torch.randn(4, dtype=torch.float64)
    with in_float64():
        assert (
            x.float().dtype
            == x.to(torch.float32).dtype
            == torch.softmax(x, 0, dtype=torch.float32).dtype
            == torch.float64
        )
        assert torch.nn.functional.softmax(x, dim=-1, dtype=torch.float32).dtype == torch.float64
    assert x.float().dtype == torch.float32


def test_edits_of_rows_give_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    source = family_source("gpt2")
    arch = arch_of(source)
    name = "transformer.h.0.attn.c_attn.weight"
    edit = Edit(lambda w: w * torch.arange(1.0, w.shape[-1] + 1), by_rows=True)
    one = TransformedSource(source, "test", {name: (edit,)}, arch).read(name)
    monkeypatch.setattr("lowbit.transforms.transformed.CHUNK", 100)
    two = TransformedSource(source, "test", {name: (edit,)}, arch).read(name)
    assert torch.equal(one, two) and two.is_contiguous()
    assert torch.allclose(one, source.read(name) * torch.arange(1.0, 33.0)[:, None].double())
