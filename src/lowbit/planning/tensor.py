"""How a tensor of a plan is worked on."""

from __future__ import annotations

from lowbit.formats import Format
from lowbit.interchange.tensors import TensorPlan
from lowbit.kernels.core import core
from lowbit.recipes.recipe import Recipe

SLAB = 1 << 22  # elements of a weight that are in float32 at a time


def by_rows(fmt: Format, shape: tuple[int, ...]) -> bool:
    """Whether a weight can be quantized some rows (2-D) or matrices (3-D) at a time with the same result."""
    if len(shape) < 2 or any(isinstance(s, Format) for s in (fmt.scale, fmt.offset.store if fmt.offset else None)):
        return False
    alone = len(shape) > 2 or (fmt.block.rows == 1 and (fmt.codebook is None or fmt.codebook.rows == 1))
    # Every stored part must keep its rows, which packed ones only do where a row fills whole bytes.
    return alone and all(len(size) >= 2 for _, size in fmt.parts(shape).values())


def solved_in_core(recipe: Recipe, fmt: Format) -> bool:
    """Whether the C++ core quantizes such a weight without text, straight from the type in which it is stored."""
    solver, fit = recipe.solver_for(fmt), recipe.fit_for(fmt)
    known = solver.method.in_core is not None and (fmt.scale is None or fit.core_fit(fmt) is not None)
    return known and core() is not None


def has_inputs(t: TensorPlan) -> bool:
    """Whether the inputs of a tensor can be in few bits: experts index their stacks, which the int8 product does not
    serve; embeddings are looked up, not multiplied."""
    return t.format is not None and t.kind in ("linear", "conv1d")
