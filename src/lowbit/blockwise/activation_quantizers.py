"""The inputs of a block's weights as they will be stored in few bits, while the block is being calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lowbit.blockwise.capture import OnInput
from lowbit.blockwise.groups import Group
from lowbit.formats import Format, InputQuantizer, Inputs
from lowbit.planning.plan import Plan
from lowbit.solvers.ranges.estimator import RangeEstimator, RangeMethod
from lowbit.tuning.straight_through import straight_through


class ActivationQuantizers:
    """Divisors, estimators of static ranges and the quantizers made of them, by weight."""

    def __init__(self, plan: Plan, divisors: Mapping[str, Tensor] | None = None) -> None:
        """`divisors` [K]: what the inputs of a weight are divided by while running."""
        self.inputs = {t.name: t.inputs for t in plan.tensors if t.inputs is not None}
        self.width = {t.name: t.stored_shape[-1] for t in plan.tensors if t.inputs is not None}
        self.methods = {name: plan.recipe.rule_for(name).range or RangeMethod() for name in self.inputs}
        self.divisors = {name: divisor.to(torch.float32) for name, divisor in (divisors or {}).items()}
        self.estimators: dict[tuple[str, Inputs, RangeMethod], RangeEstimator] = {}
        self.scales: dict[str, dict[str, Tensor]] = {}
        self.observed: dict[str, set[tuple[str, Inputs, RangeMethod]]] = {}

    def observe(self, groups: Iterable[Group]) -> None:
        """From now on the static ranges of these groups, and of no others, are looked for. The first weight stands for
        its group, whose members share the input, and those with the same static inputs the range."""
        self.observed = {
            g.first: {key for name in g.members if (key := self._key(g, name)) is not None} for g in groups
        }

    def _key(self, group: Group, name: str) -> tuple[str, Inputs, RangeMethod] | None:
        inputs = self.inputs.get(name)
        return (group.first, inputs, self.methods[name]) if inputs is not None and inputs.static else None

    def rounded(self, name: str, x: Tensor) -> Tensor | None:
        """What the weight is multiplied with instead of `x`; None: `x` itself. Until its range is known, a static input
        stays float."""
        inputs, keys = self.inputs.get(name), self.observed.get(name, set())
        if inputs is None and not keys:
            return None
        x = self.divided(name, x)
        for key in keys:
            if key not in self.estimators:
                self.estimators[key] = key[2].start(_format(key[1]))
            self.estimators[key].observe(x)
        if inputs is None or (inputs.static and name not in self.scales):
            return x
        parts = {k: v for k, v in self.parts(name, prefix="").items() if k != "input_divisor"}
        scale, offset = parts.get("input_scale"), parts.get("input_offset")
        return InputQuantizer(inputs, scale, offset).round(x)

    def rounded_through(self, name: str, x: Tensor) -> Tensor | None:
        """`rounded`, with gradients as if nothing were rounded."""
        with torch.no_grad():
            kept = self.rounded(name, x)
        if kept is None or kept is x:
            return None
        return straight_through(self.divided(name, x), kept)

    def rounding(self, on_input: Callable[[str, int | None, Tensor], object] | None = None) -> OnInput:
        """What makes an `InputCapture` multiply with `rounded`; `on_input` sees the same."""

        def both(name: str, expert: int | None, x: Tensor) -> Tensor | None:
            kept = self.rounded(name, x)
            if on_input is not None:
                on_input(name, expert, x if kept is None else kept)
            return kept

        return both

    def divided(self, name: str, x: Tensor) -> Tensor:
        """x / d of this weight, where its input is divided while running; in the type of x."""
        return (x.to(torch.float32) / self.divisors[name]).to(x.dtype) if name in self.divisors else x

    def fix_ranges(self, group: Group) -> None:
        """Everything was seen: static scales from now on; members of a group share one input, and so one scale."""
        for name in group.members:
            key = self._key(group, name)
            if key is not None and key in self.estimators:
                self.scales[name] = self.estimators[key].input_parts(key[1])
        self.observed.pop(group.first, None)

    def parts(self, name: str, prefix: str | None = None) -> dict[str, Tensor]:
        """What is stored of the inputs with the weight, by the name in the file."""
        inputs = self.inputs.get(name)
        if inputs is None:
            return {}
        found = dict(self.scales.get(name, {}))
        if inputs.divisor:
            found["input_divisor"] = self.divisors.get(name, torch.ones(self.width[name]))
        start = f"{name}." if prefix is None else prefix
        return {start + part: value for part, value in found.items()}

    def parts_unseen(self, name: str) -> dict[str, Tensor]:
        """The parts of a weight that no text reached: nothing is known of its range, so 1 stands for it."""
        inputs = self.inputs.get(name)
        if inputs is None:
            return {}
        blank = {part: torch.ones(size) for part, (_, size) in inputs.parts(self.width[name]).items()}
        return {f"{name}.{part}": value for part, value in blank.items()}


def _format(inputs: Inputs) -> Format:
    assert inputs.format is not None, "static inputs have a format"
    return inputs.format
