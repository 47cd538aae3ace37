"""Rotations keep the function of every family, alone and together, and do spread outliers."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import TransformError
from lowbit.transforms.arch import arch_of
from lowbit.transforms.check import check_function
from lowbit.transforms.fold import fold
from lowbit.transforms.hadamard import Rotation
from lowbit.transforms.rotate import rotate
from variants import FAMILIES, family_source

CHOICES = [{"r1": 1, "r2": 0}, {"r1": 0, "r2": 1}, {"r1": 0, "r2": 0, "r4": 1}, {"r4": 1, "seed": 3}]


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_rotating_keeps_the_function(name: str, options: dict[str, int]) -> None:
    source = family_source(name)
    if arch_of(source).post_norms and options.get("r1", 1):
        with pytest.raises(TransformError, match=r"post_attention_layernorm.*r1=0"):
            rotate(source, **options)
        return
    turned = rotate(source, **options)
    assert check_function(source, turned) < 1e-10
    arch = arch_of(source)
    changed = {n for n in source.tensors if not torch.equal(turned.read(n), source.read(n))}
    expected = set()
    if options.get("r1", 1):
        expected |= {w for w in arch.writers} | {r for n in arch.norms for r in n.readers if r in source.tensors}
    if options.get("r2", 1):
        expected |= {link.producer for link in arch.links if link.is_values}
    if options.get("r4"):
        expected |= set(arch.seconds)
        assert set(turned.online) == set(arch.seconds)
    assert expected and expected <= changed
