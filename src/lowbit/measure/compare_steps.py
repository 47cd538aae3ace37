"""Where a comparison is: its stages, the float model first and then each recipe's, with the time left of all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from lowbit.interchange.pace import Clock, Stage, Stages
from lowbit.interchange.progress import OnStep

_FLOAT, _RECIPE = "windows of the float model", "windows of a recipe"
Alike = Callable[[str], tuple[str, ...]]


class CompareSteps:
    """Tells `show` of every stage of comparing `recipes` on so many `windows`.

    alike    names of what quantizing by a recipe is like, the most alike first: such recipes take about as long
    speed    whether speed is measured too
    kept     indices of recipes whose rows are at hand already, and -1 for the float model's
    redrawn  whether kept recipes are quantized again, for figures
    """

    def __init__(
        self, recipes: Sequence[str], windows: int, show: OnStep, alike: Alike = lambda recipe: (), *,
        speed: bool = False, kept: Collection[int] = (), redrawn: bool = False, clock: Clock = time.monotonic,
    ) -> None:  # fmt: skip
        self._own = Stage("the float model: measuring", (_FLOAT,), windows, "windows")
        self._of: list[dict[str, Stage]] = []
        for index, recipe in enumerate(recipes):
            title = f"{recipe} (recipe {index + 1} of {len(recipes)})"
            stages = {}
            what = "quantizing again to draw its weights" if index in kept else "quantizing"
            if index not in kept or redrawn:
                stages["quantizing"] = Stage(f"{title}: {what}", alike(recipe), 1, "%")
            if index not in kept:
                stages["measuring"] = Stage(f"{title}: measuring", (_RECIPE, _FLOAT), windows, "windows")
                if speed:
                    stages["speed"] = Stage(f"{title}: measuring speed", ("speed",), 1, "runs")
            self._of.append(stages)
        own = [] if -1 in kept else [self._own]
        self._stages = Stages([*own, *(s for stages in self._of for s in stages.values())], show, clock)

    def measuring_float(self) -> None:
        self._stages.begin(self._own)

    def begins(self, index: int, stage: str) -> None:
        """`stage` of the recipe with this index begins: quantizing, measuring or speed."""
        self._stages.begin(self._of[index][stage])

    def failed(self) -> None:
        """The stage at hand ended in an error: what it took says nothing of others."""
        self._stages.drop()

    def move(self, done: int, total: int) -> None:
        """So much of the stage at hand is done."""
        self._stages.move(done, total)
