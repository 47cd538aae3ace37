"""Which weights of a block read the same input, in which order, and what is known of each input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lowbit.blockwise.block_runner import LeaveForward
from lowbit.blockwise.capture import InputCapture
from lowbit.solvers.stats import Stats, StatsBuilder


@dataclass(eq=False)
class Group:
    """Weights that read one input. `members` in the order of use; `calls`: products with the first of them."""

    members: list[str]
    calls: int = 1

    @property
    def first(self) -> str:
        return self.members[0]


Pass = list[Group]


def find_passes(
    weights: Mapping[str, Tensor], run: Callable[[], Any], role: Callable[[str], str] | None = None
) -> list[Pass]:
    """The groups of a block, by running it once; groups of the same place in different experts form one pass.

    Weights whose input is the same tensor share a group. `role`: the place of a weight, the same for all experts; None: each group
    is a pass of its own.
    """
    groups: dict[str, Group] = {}
    by_input: dict[Any, Group] = {}
    alive: list[Tensor] = []  # inputs, so that no other gets the same memory

    def on_input(name: str, expert: int | None, x: Tensor) -> None:
        alive.append(x)
        key = (x.data_ptr(), tuple(x.shape), x.stride()) if expert is None else name
        if name in groups:
            groups[name].calls += groups[name].first == name
            return
        group = by_input.get(key)
        if group is None:
            group = by_input[key] = Group([])
        group.members.append(name)
        groups[name] = group

    with InputCapture(weights, on_input):
        run()
    passes: dict[str, Pass] = {}
    for group in by_input.values():
        passes.setdefault(group.first if role is None else role(group.first), []).append(group)
    return list(passes.values())


def role_in(block: nn.Module, prefix: str) -> Callable[[str], str]:
    """The name of a weight in which numbers of modules in a `ModuleList`, such as experts, are left out; not those of a `Sequential`,
    whose modules read one another. `prefix`: the name of the block."""
    lists = {f"{prefix}.{name}" for name, module in block.named_modules() if isinstance(module, nn.ModuleList)}

    def role(name: str) -> str:
        parts = name.split(".")
        return ".".join("#" if ".".join(parts[:i]) in lists else part for i, part in enumerate(parts))

    return role


class Collector:
    """Gathers the statistics of one pass; experts of a stack each have their own.

    `half`: see StatsBuilder. `stop`: leave the forward as soon as nothing more can come.
    """

    def __init__(self, pass_: Sequence[Group], half: bool = False, stop: bool = True) -> None:
        self.first = {group.first: group for group in pass_}
        self.half = half
        self.enough = pass_[0].calls if stop and len(pass_) == 1 else 0
        self.builders: dict[tuple[str, int | None], StatsBuilder] = {}
        self.begin()

    def wants(self, name: str) -> bool:
        """Whether the inputs of this weight are gathered."""
        return name in self.first

    def begin(
        self, x_float: Mapping[str, Tensor] | None = None, token_weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """A new micro-batch, with the float model's inputs [tokens, K] where they are compared, and with the weights of its
        tokens [tokens] where these differ."""
        self.calls, self.x_float, self.token_weights = 0, x_float or {}, token_weights or {}

    def on_input(self, name: str, expert: int | None, x: Tensor) -> None:
        """Add an input; leaves the forward when nothing more can come."""
        if name not in self.first:
            return
        compare = self.x_float.get(name) if expert is None else None
        key = (name, expert)
        if key not in self.builders:
            self.builders[key] = StatsBuilder(x.shape[-1], compare is not None, self.half)
        elif x.shape[-1] != len(self.builders[key].absmax):
            return  # the same weight the other way round, as in a head that is tied to a projection
        self.builders[key].add(x, compare, self.token_weights.get(name) if expert is None else None)
        self.calls += 1
        if expert is None and self.calls == self.enough:
            raise LeaveForward

    def stats(self, group: Group) -> Stats | dict[int, Stats] | None:
        """Of a group's input; by expert for a stack; None when it was never seen."""
        found = {expert: b.stats() for (name, expert), b in self.builders.items() if name == group.first}
        if None in found:
            return found[None]
        return {expert: found[expert] for expert in sorted(e for e in found if e is not None)} or None
