"""The inputs of a block are scaled by the recipe's transforms, where the block as a whole is better for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lowbit.blockwise.activation_quantizers import ActivationQuantizers
from lowbit.blockwise.groups import Collector, Group, Pass
from lowbit.blockwise.output_reference import OutputReference
from lowbit.blockwise.rewriter import Rewriter
from lowbit.blockwise.walk import Block
from lowbit.planning.plan import Plan
from lowbit.solvers.stats import Stats


@dataclass(frozen=True)
class Scaled:
    """The weights of a block with the inputs of its groups scaled, as the source stores them.

    scales     by the first weight of a group, [K]: what its input is divided by, wherever the division takes place
    divisors   by weight, [K]: what its input is divided by while running; that of the others something before it takes
    """

    weights: dict[str, Tensor]
    scales: dict[str, Tensor] = field(default_factory=dict)
    divisors: dict[str, Tensor] = field(default_factory=dict)


def scale_inputs(block: Block, passes: Sequence[Pass], plan: Plan, rewriter: Rewriter | None) -> Scaled:
    """Scale the inputs of all groups of a block; the new weights are in their places.

    A group's scale is chosen by the errors of its own products. Where transforms choose, the block as a whole decides
    whether any is kept: by what it returns, each weight rounded to nearest, compared with the same without scaling.
    """
    before = Scaled(dict(block.weights))
    if rewriter is None:
        return before
    groups = [group for pass_ in passes for group in pass_]
    if not (rewriter.chooses and block.returns):
        return _put(block, before, _scaled(block, groups, plan, rewriter))
    reference = OutputReference(block.folder)
    with block.capture(ActivationQuantizers(plan).rounding()):
        reference.record(block.run, block.batches)
    plain = _error(block, before, plan, rewriter, reference)
    found = _put(block, before, _scaled(block, groups, plan, rewriter))
    if found.scales and not _error(block, found, plan, rewriter, reference) < plain:
        found = _put(block, found, before)
    reference.remove()
    return found


def _put(block: Block, old: Scaled, new: Scaled) -> Scaled:
    """`new`, its weights in place of those of `old`."""
    for name, weight in new.weights.items():
        if weight is not old.weights[name]:
            block.place(name, weight)
    return new


def _error(block: Block, scaled: Scaled, plan: Plan, rewriter: Rewriter, reference: OutputReference) -> float:
    """How far the block's output is from the reference with each weight rounded to nearest."""
    plans = {t.name: t for t in plan.tensors}
    for name in block.multiplied:
        block.place(name, rewriter.nearest(plans[name], scaled.weights[name]))
    with block.capture(ActivationQuantizers(plan, scaled.divisors).rounding()):
        error = reference.error(block.run, block.batches)
    for name in block.multiplied:
        block.place(name, scaled.weights[name])
    return error


def _scaled(block: Block, groups: Sequence[Group], plan: Plan, rewriter: Rewriter) -> Scaled:
    """What the transforms find for each group in turn."""
    collector, activations = Collector(groups, stop=False), ActivationQuantizers(plan)
    for batch in range(block.batches):
        collector.begin()
        with block.capture(activations.rounding(collector.on_input)):
            block.run(batch)
    plans = {t.name: t for t in plan.tensors}
    found = Scaled(dict(block.weights))
    for group in groups:
        members, stats = [plans[name] for name in group.members], collector.stats(group)
        if not isinstance(stats, Stats) or members[0].format is None:
            continue
        while_running = all(t.inputs is not None and t.inputs.divisor for t in members)
        new = rewriter.scale(group.members, found.weights, stats, members[0], while_running)
        if new is None:
            continue
        weights, scale = new
        divided = dict.fromkeys(group.members, scale) if while_running else {}
        found = Scaled(weights, found.scales | {group.first: scale}, found.divisors | divided)
    return found
