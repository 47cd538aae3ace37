"""What of a model calibration text does not come to: said in the plan, before the work."""

from __future__ import annotations

from dataclasses import replace

from lowbit.blockwise.skeleton import Skeleton
from lowbit.blockwise.text_path import made_up_ids, text_path
from lowbit.errors import SourceError
from lowbit.interchange.hf.text_config import text_config
from lowbit.interchange.source import Source
from lowbit.planning.plan import Plan


def with_reach(plan: Plan, source: Source) -> Plan:
    """The plan with a sentence on the weights that text does not come to; as it is where the model has no other parts than those of text.

    No weight is read.
    """
    config = source.config
    if config is None or text_config(config) is config or not plan.recipe.calibrated().uses_calibration:
        return plan
    try:
        path = text_path(Skeleton(source, plan.tied).module, made_up_ids(config))
    except SourceError:  # said where calibration is asked for
        return plan
    missed = set(path.misses(plan.tensors, plan.tied))
    weights = [t for t in plan.tensors if t.name in missed and t.format is not None]
    if not weights:
        return plan
    share = sum(t.count for t in weights) / max(1, plan.parameters)
    note = (
        f"calibration text does not come to {len(weights)} weights ({share:.1%} of the parameters), such as {weights[0].name}: "
        "they are quantized without it"
    )
    return replace(plan, notes=(*plan.notes, note))
