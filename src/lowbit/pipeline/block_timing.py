"""Stopwatches of a rehearsal: a clock that other programs hardly touch, what a forward spends in attention, and what gathering the
statistics of inputs takes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowbit.blockwise.block_runner import LeaveForward
from lowbit.blockwise.groups import Collector, Group
from lowbit.solvers.stats import Stats

Clock = Callable[[], float]  # seconds

_SCORES = (torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm)
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class Unshared:
    """A clock of work as it would be with no other program beside it.

    Of each stretch between two looks it counts the smaller of two times: that on the wall, and that of this process's threads on all
    processors. Alone on a machine, work takes the first. Beside busy programs the first grows with what they do and the second by less
    (threads that wait for each other still count), so that a passing load seldom decides how a model is quantized.
    """

    def __init__(self, wall: Clock = time.perf_counter, processors: Clock = time.process_time) -> None:
        self._clocks = (wall, processors)
        self._last = [clock() for clock in self._clocks]
        self._seconds = 0.0

    def __call__(self) -> float:
        now = [clock() for clock in self._clocks]
        self._seconds += max(0.0, min(b - a for a, b in zip(self._last, now, strict=True)))
        self._last = now
        return self._seconds


class Watch:
    """Seconds by name."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def of(self, name: str) -> Lap:
        return Lap(self, name)


class Lap:
    """Adds the seconds of its block, however that is left."""

    def __init__(self, watch: Watch, name: str) -> None:
        self.watch, self.name = watch, name

    def __enter__(self) -> None:
        self.start = self.watch.clock()

    def __exit__(self, *left: object) -> None:
        self.watch.seconds[self.name] += self.watch.clock() - self.start


class AttentionTime(TorchFunctionMode):
    """Times what grows with the square of a window: attention in one call, or products of activations and their softmax."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        scores = func in _SCORES and all(_is_activation(x) for x in args[:2])
        softmax = func in _SOFTMAX and _is_activation(args[0] if args else None)
        if not (scores or softmax or func is F.scaled_dot_product_attention):
            return func(*args, **(kwargs or {}))
        with self.watch.of("attention"):
            return func(*args, **(kwargs or {}))


class Gathered:
    """Collects statistics without and with the float model's inputs, of few columns and few experts, and times both."""

    def __init__(self, clock: Clock, width: int, experts: int) -> None:
        """`width`: columns of an input that are gathered; `experts` of a stack."""
        self.clock, self._width, self._experts = clock, width, experts
        self.spent = self.finish = 0.0
        self._seconds = {False: 0.0, True: 0.0}

    def begin(self, plain: Collector, drift: Collector, x_float: Mapping[str, Tensor]) -> None:
        """A pass; `x_float` [tokens, K] of the float model."""
        self.collectors = {False: plain, True: drift}
        plain.begin()
        drift.begin({name: x[:, : self._width] for name, x in x_float.items()})
        self.seen: defaultdict[str, int] = defaultdict(int)
        self.added: defaultdict[str, int] = defaultdict(int)
        self.cost: defaultdict[tuple[str, bool], float] = defaultdict(float)
        self.width: dict[str, int] = {}

    def on_input(self, name: str, expert: int | None, x: Tensor) -> None:
        if not self.collectors[False].wants(name):
            return
        begin = self.clock()
        rows = x.numel() // max(1, x.shape[-1])
        self.seen[name] += rows
        self.width[name] = x.shape[-1]
        try:
            if expert is None or expert < self._experts:
                self.added[name] += rows
                self._add(name, expert, x[..., : self._width])
        finally:
            self.spent += self.clock() - begin

    def _add(self, name: str, expert: int | None, x: Tensor) -> None:
        left = None
        for drift, collector in self.collectors.items():
            start = self.clock()
            try:
                collector.on_input(name, expert, x)
            except LeaveForward as enough:
                left = enough
            self.cost[name, drift] += self.clock() - start
        if left is not None:
            raise left

    def stats(self, group: Group, experts: int) -> Stats | None:
        """Of a group, of one of its experts; None where no token came. What it all took is added up."""
        name = group.first
        if not self.added[name]:
            return None
        squares = max(1.0, self.width[name] / self._width) ** 2
        for drift in (False, True):
            self._seconds[drift] += self.cost[name, drift] * squares * self.seen[name] / self.added[name]
        start = self.clock()
        found = self.collectors[True].stats(group)
        self.finish += (self.clock() - start) * squares * (experts / len(found) if isinstance(found, dict) else 1)
        return next(iter(found.values())) if isinstance(found, dict) else found

    def seconds(self, drift: bool) -> float:
        """For the tokens of the window."""
        return self._seconds[drift]


def _is_activation(x: object) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, nn.Parameter) and x.dim() > 2
