"""Which picture a result has: for each class its function, by which `print` and notebooks show it (see `lowbit/display.py`)."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

# "module.Class": "module.function" of (value, width=columns), both below `lowbit`.
VIEWS = {
    "budget.allocation.Allocation": "report.results_view.render_allocation",
    "convert.dequantizing.Dequantized": "report.results_view.render_dequantized",
    "convert.exporting.Exported": "report.results_view.render_exported",
    "formats.format.Format": "report.results_view.render_format",
    "kv.cache_format.CacheFormat": "report.cache_view.render_cache_format",
    "kv.side.CacheSide": "report.cache_view.render_cache_side",
    "measure.bench.Bench": "report.bench_view.render_bench",
    "measure.card.Card": "report.panel.render_card",
    "measure.kv.result.CacheCheck": "report.cache_view.render_cache_check",
    "pipeline.api.Quantized": "report.report_view.render_quantized",
    "pipeline.report.Report": "report.report_view.render_report",
    "planning.plan.Plan": "report.plan_view.render_plan",
    "recipes.recipe.Recipe": "report.results_view.render_recipe",
    "report.comparison.Comparison": "report.tables.render_compare",
    "report.doctor.Report": "report.doctor_view.render_report",
    "report.explain.Explanation": "report.explain_view.render_explanation",
    "report.inspect.Inspection": "report.inspect.render_inspection",
    "report.recommendation.Recommendation": "report.recommend_view.render_recommendation",
    "report.look.Catalogue": "report.results_view.render_names",
}


def drawn(value: object, width: int) -> RenderableType:
    """The picture of a value for `width` columns. TypeError for one that has none."""
    for kind in type(value).__mro__:
        name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("lowbit.")
        if name in VIEWS:
            module, _, function = VIEWS[name].rpartition(".")
            view: Any = getattr(import_module(f"lowbit.{module}"), function)
            sized = {"width": width} if "width" in signature(view).parameters else {}
            picture: RenderableType = view(value, **sized)
            return picture
    raise TypeError(f"{type(value).__name__} has no picture: add a line to lowbit.report.views")
