"""Which static ranges explode, found before the plan: one pass of the float model over some of the calibration text.

In a few tokens the inputs of single layers reach a thousand times what is usual there (massive activations, Sun et al.
2024). One scale for the tensor must lose these tokens or all others, whatever the estimator. The layers where that is so
get the recipe's fallback, as layer globs of an ordinary recipe; so planned bytes stay exact and the result says it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.blockwise.activation_quantizers import ActivationQuantizers
from lowbit.blockwise.rewriter import Rewriter
from lowbit.blockwise.scaling import scale_inputs
from lowbit.blockwise.walk import Block, BlockWalk
from lowbit.calibration.data import Calibration
from lowbit.formats import IntGrid
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorPlan
from lowbit.kernels.heap import trim
from lowbit.planning.plan import Plan, make_plan
from lowbit.recipes.activation_rules import InputRule, Survey
from lowbit.recipes.layer_globs import globs_of
from lowbit.recipes.recipe import Recipe
from lowbit.solvers import Call

WINDOWS = 8  # explosions are of single tokens that every text has, such as the first; spread evenly over the text
BOUNDLESS = 1e30
OnBlock = Callable[[str], None]
_DIGITS = 4  # of a ratio: fewer than the order of additions changes


def may_fall_back(plan: Plan) -> list[str]:
    """Weights whose static inputs may fall back: integers, and static by `a=` rather than by a glob of their own."""
    recipe = plan.recipe
    if recipe.fallback is None:
        return []
    return [
        t.name
        for t in plan.tensors
        if _static(t) and not any(recipe.matches(p, t.name) for p, _ in recipe.layer_inputs)
    ]


def _static(t: TensorPlan) -> bool:
    fmt = None if t.inputs is None or not t.inputs.static else t.inputs.format
    return fmt is not None and isinstance(fmt.grid, IntGrid)  # steps of floats follow the value


def survey(
    plan: Plan, source: Source, calibration: Calibration, folder: Path, dtype: torch.dtype, key: str = "",
    on_block: OnBlock = lambda name: None,
) -> Survey:  # fmt: skip
    """Largest to typical input of every weight that may fall back, seen through the recipe's transforms.

    `folder`: of what blocks return. `dtype`: in which products are computed. `key` is kept with it: what it depends on.
    `on_block` is given the name of each block before it is looked at.
    """
    assert plan.recipe.fallback is not None
    found = _ratios(plan, source, _some(calibration), folder, dtype, on_block)
    trim()
    ratios = {name: float(f"{found[name]:.{_DIGITS}g}") for name in may_fall_back(plan) if name in found}
    return Survey(key, plan.recipe.fallback.over, ratios)


def with_survey(plan: Plan, source: Source, found: Survey) -> Plan:
    """The plan in which the layers of exploded ranges have the recipe's fallback, said by globs before its own."""
    recipe = plan.recipe
    if found.exploded:
        assert recipe.fallback is not None
        rule = InputRule(recipe.fallback.inputs)
        globs = tuple((g, rule) for g in globs_of(found.exploded, [t.name for t in plan.tensors]))
        recipe = replace(recipe, layer_inputs=(*globs, *recipe.layer_inputs), fallback=None, name=None)
        plan = make_plan(source, recipe, context=plan.context, max_shard_bytes=plan.max_shard_bytes)
    return replace(plan, survey=found)


def survey_in(head: Mapping[str, Any], key: str) -> Survey | None:
    """The survey that the journal of an unfinished run holds, if it depends on the same."""
    found = head.get("survey")
    return Survey(**found) if isinstance(found, dict) and found.get("key") == key else None


def survey_entry(found: Survey | None) -> dict[str, Any]:
    """What `survey_in` reads."""
    return {} if found is None else {"survey": asdict(found)}


def _some(calibration: Calibration) -> Calibration:
    count = len(calibration.ids)
    taken = min(WINDOWS, count)
    return replace(calibration, ids=tuple(calibration.ids[i * count // taken] for i in range(taken)))


def _ratios(
    plan: Plan, source: Source, calibration: Calibration, folder: Path, dtype: torch.dtype, on_block: OnBlock
) -> dict[str, float]:
    """Of each weight that may fall back and that the text reaches: largest |x| / root mean square of the median token.

    A visitor of the walk that quantizes nothing: blocks are scaled as they will be, run once, and looked at.
    """
    walk = BlockWalk(plan, source, calibration.ids, folder, dtype)
    walk.place_outside()
    rewriter, names = Rewriter.of(source, _cheap(plan.recipe)), set(may_fall_back(plan))
    found: dict[str, float] = {}
    for block in walk.blocks():
        if block.returns or names.intersection(block.weights):
            on_block(block.name)
            found |= _ratios_of(block, plan, rewriter, names)
    return found


@torch.no_grad()
def _ratios_of(block: Block, plan: Plan, rewriter: Rewriter | None, names: set[str]) -> dict[str, float]:
    passes = block.passes()
    activations = ActivationQuantizers(plan, scale_inputs(block, passes, plan, rewriter).divisors)
    groups = [group for pass_ in passes for group in pass_ if names.intersection(group.members)]
    spreads = {group.first: Spread() for group in groups}

    def on_input(name: str, expert: int | None, x: Tensor) -> Tensor:
        x = activations.divided(name, x)
        if name in spreads:
            spreads[name].add(x)
        return x

    for batch in range(block.batches):
        with block.capture(on_input):
            block.save(batch, block.run(batch))
    return {name: spreads[group.first].ratio() for group in groups for name in group.members if name in names}


class Spread:
    """How far the largest value of an input lies from the usual ones."""

    def __init__(self) -> None:
        self.largest, self.tokens = 0.0, [torch.zeros(0)]

    def add(self, x: Tensor) -> None:
        """See x [..., channels]."""
        x = x.reshape(-1, x.shape[-1]).to(torch.float32)
        self.largest = max(self.largest, float(x.abs().max()))
        self.tokens.append(x.square().mean(1).sqrt())

    def ratio(self) -> float:
        """max |x| / median over tokens of the root mean square over channels; 0 of nothing but zeros.

        Where most tokens are zero throughout, so that nothing is typical, it is BOUNDLESS, which JSON can hold.
        """
        typical = float(torch.cat(self.tokens).median()) if self.largest else 1.0
        return self.largest / typical if typical else BOUNDLESS


def _cheap(recipe: Recipe) -> Recipe:
    """Rounds weights to nearest: what scales of channels are weighed with, where they are searched for at all."""
    fit = Call("absmax")
    return replace(recipe, solver=None, fit=fit if fit.method.declines(recipe.format) is None else None)
