"""The size, bits, divergence or memory that `lowbit quantize` is to meet: a format for each layer, shown before the work begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowbit.cli import console


def chosen(
    size: str | None, bits: float | None, kl: float | None, memory: str | None, context: int | None,
    sensitivity: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """The one target that was given, as arguments of `lowbit.allocate`; empty for none. RecipeError for more than one,
    and for options that would be ignored."""
    from lowbit.budget.sizes import typed_size
    from lowbit.errors import RecipeError

    given = {"target_size": size, "target_bits": bits, "target_kl": kl, "fit_memory": memory}
    found: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    names = [f"--{key.replace('_', '-')}" for key in found]
    if len(found) > 1:
        raise RecipeError(f"{' and '.join(names)} exclude each other; give one target")
    if context is not None and memory is None:
        raise RecipeError("--context belongs to --fit-memory and would be ignored; leave it out")
    if sensitivity is not None and not found:
        raise RecipeError("--sensitivity would be ignored without a target; add --target-bits, for example")
    for option, typed in (("--target-size", size), ("--fit-memory", memory)):
        if typed is not None:
            typed_size(option, typed)
    return found | ({"context": context} if context is not None else {})


_NAMES = {"target_size": "{}", "target_bits": "{}-bits", "target_kl": "kl-{}", "fit_memory": "in-{}"}


def in_a_name(target: dict[str, Any]) -> str:
    """A target as a part of the name of its result, such as "80MB" or "5.5-bits"; empty for none."""
    return next((form.format(target[key]) for key, form in _NAMES.items() if key in target), "")


def allocated(model: Any, recipe: Any, target: dict[str, Any], sensitivity: Path, screen: Any, **text: Any) -> Any:
    """The recipe for the target; what it found is printed."""
    import lowbit
    from lowbit.budget.allocation import formats_of
    from lowbit.interchange.progress import TEXT
    from lowbit.report.wording import bytes_text

    known = sensitivity.exists()
    with console.progress("measuring how much each layer loses in each format") as shown:
        found = lowbit.allocate(
            model,
            recipe,
            sensitivity=sensitivity,
            progress=lambda what, done, total: shown.move(done, total, what, what == TEXT),
            **text,
            **target,
        )
    plan = found.plan
    console.say(
        screen,
        f"sensitivity {'read from' if known else 'kept in'} {sensitivity}; predicted KL {found.predicted_kl:.4f} nats/token, "
        f"{plan.linear_bits_per_weight:.3f} bits per weight in the linear layers, {bytes_text(plan.output_bytes)}",
    )
    total = sum(formats_of(found.rows).values())
    shares = ", ".join(f"{count / total:.0%} {fmt}" for fmt, count in formats_of(found.rows).items())
    console.say(screen, f"formats: {shares}")
    for line in found.found_sensitive()[:6]:
        console.say(screen, f"  {line}", style="dim")
    return found.recipe
