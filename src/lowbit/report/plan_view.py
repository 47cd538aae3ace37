"""A plan drawn for people: what becomes of every tensor, and the totals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowbit.interchange.inventory import kept_words
from lowbit.interchange.tensors import TensorPlan
from lowbit.planning.plan import Plan
from lowbit.recipes.activation_rules import inputs_text
from lowbit.recipes.cache_rules import cache_settings
from lowbit.report.layout import headline, named_lines, table_or_list
from lowbit.report.wording import bytes_text, count_text, grouped, pattern_of, shape_text, span_text

if TYPE_CHECKING:
    from rich.console import RenderableType


def render_plan(plan: Plan, *, every: bool = False, width: int = 1000) -> RenderableType:
    """A row for each group of like tensors, or for `every` tensor, and the totals.

    `width` in characters: columns that matter less are left out until the table fits, and where it does not, it is a list.
    """
    from rich.console import Group

    def alike(t: TensorPlan) -> Any:
        return pattern_of(t.name), t.shape, t.dtype, t.format, t.keep

    groups = [[t] for t in plan.tensors] if every else grouped(plan.tensors, alike)
    stays = [i for i, group in enumerate(groups) if group[0].format is None]
    rows = [_row(group) for group in groups]
    less = ("count", "before", "now", "bits/\nweight", "shape")
    table = table_or_list(_HEADINGS, rows, width, expendable=less, left=_LEFT, dim=stays)
    head = headline(plan.label, plan.recipe.title, width)
    return Group(head, table, named_lines(_totals(plan)))


_LEFT = ("tensor", "shape", "now", "becomes")
_HEADINGS = ("tensor", "count", "shape", "now", "becomes", "bits/\nweight", "before", "after")


def _row(group: list[TensorPlan]) -> list[str]:
    """The cells of tensors that become alike."""
    first = group[0]
    before, after = sum(t.bytes_before for t in group), sum(t.bytes_after for t in group)
    return [
        span_text([t.name for t in group]),
        str(len(group)),
        shape_text(first.shape),
        str(first.dtype).removeprefix("torch."),
        str(first.format) if first.format is not None else f"stays: {kept_words(first.name, first.keep or '')}",
        f"{8 * after / max(1, sum(t.count for t in group)):.2f}",
        bytes_text(before),
        bytes_text(after),
    ]


def peak_text(plan: Plan) -> str:
    """'about 734 MiB while quantizing; about 1 GiB while measuring the card', of `lowbit quantize`, whose peak is the larger."""
    said = f"about {bytes_text(plan.peak_bytes)} while quantizing"
    text, card = plan.calibrated_peak_bytes, plan.card_peak_bytes
    if text is not None and text != plan.peak_bytes:
        said += f", about {bytes_text(text)} with calibration text"
    return said if card is None else f"{said}; about {bytes_text(card)} while measuring the card"


def _cache(plan: Plan) -> list[tuple[str, str]]:
    """What the model keeps between tokens; nothing for one that writes none."""
    kv = plan.kv
    each, whole = bytes_text(kv.bytes_per_token), bytes_text(plan.kv_bytes)
    if not kv.bytes_per_token:
        return [("state", f"{whole} in 16 bits, whatever the length of the text")] if plan.kv_bytes else []
    bits = " in 16 bits" if kv.format is None else ""
    less = "" if kv.format is None else f"; in 16 bits it would be {bytes_text(plan.kv_bytes_before)}"
    stored = [("" if i else "stored as", setting) for i, setting in enumerate(cache_settings(kv.format))]
    if kv.read:
        tokens = f"{each} a token written and {bytes_text(kv.read)} a token read"
        return [
            ("KV cache", f"{tokens},{bits}{';' if bits else ''} {whole} at {plan.context:,} of each{less}"),
            *stored,
        ]
    fixed = f", {bytes_text(kv.fixed)} of it whatever the length" if kv.fixed else ""
    return [("KV cache", f"{each} a token{bits}, {whole} at {plan.context:,} tokens{fixed}{less}"), *stored]


def _totals(plan: Plan) -> list[tuple[str, str]]:
    before, after = bytes_text(plan.bytes_before), bytes_text(plan.output_bytes)
    times = plan.bytes_before / max(1, plan.output_bytes)
    lines = [
        ("parameters", f"{count_text(plan.parameters)}, {100 * plan.coverage:.2f} % of them quantized"),
        ("size", f"{before} -> {after}, {times:.1f} times smaller ({plan.output_bytes:,} bytes)"),
        ("bits per weight", f"{plan.bits_per_weight:.3f} in all, {plan.linear_bits_per_weight:.3f} in linear layers"),
        ("peak memory", peak_text(plan)),
    ]
    counts, fallback = plan.input_counts(), plan.recipe.fallback
    if counts:
        static = any(t.inputs is not None and t.inputs.static for t in plan.tensors)
        falls = (
            f"; {fallback} where calibration text shows that a fixed range would be far too wide"
            if static and fallback
            else ""
        )
        lines.append(("inputs", inputs_text(counts, None) + falls))
    lines += [("tied", f"{alias} is {name}") for alias, name in plan.tied.items()]
    lines += _cache(plan)
    return lines + [("note", note) for note in (*plan.notes, *plan.about_source, *plan.about_cache, *plan.advice)]
