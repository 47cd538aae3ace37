"""What is gathered of the input that weights share."""

from __future__ import annotations

import torch

from lowbit.blockwise.groups import Collector, Group
from lowbit.solvers.stats import Stats


def test_of_a_weight_that_is_also_used_the_other_way_round_only_its_inputs_count() -> None:
    """`x @ weight` after `F.linear(x, weight)`, as in a head that is tied to a projection."""
    x, turned = torch.randn(5, 8), torch.randn(5, 12)
    group = Group(["w"], calls=2)
    for half in (False, True):
        collector = Collector([group], half, stop=False)
        collector.on_input("w", None, x)
        collector.on_input("w", None, turned)
        found = collector.stats(group)
        assert isinstance(found, Stats) and found.tokens == 5
        torch.testing.assert_close(found.second_moment, x.T @ x / 5, rtol=2e-2, atol=2e-2)
