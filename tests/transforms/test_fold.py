"""Folding norms keeps the function of every family, and does what it says."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import TransformError
from lowbit.transforms.arch import arch_of
from lowbit.transforms.check import check_function
from lowbit.transforms.fold import fold
from variants import FAMILIES, family_source


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_folding_keeps_the_function(name: str, head: int) -> None:
    source = family_source(name)
    folded = fold(source, head=head)
    assert check_function(source, folded) < 1e-10
    changed = 0
    for norm in arch_of(source).norms:
        kept = not head and any(reader in source.inventory.tied for reader in norm.readers)
        weight = folded.read(norm.weight)
        expected = source.read(norm.weight) if kept else torch.full_like(weight, 0.0 if norm.plus_one else 1.0)
        assert torch.equal(weight, expected)
        changed += not kept
    assert changed >= 3
