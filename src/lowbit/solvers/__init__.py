"""How weights become codes: fits (ranges to scales) and solvers (weights to codes)."""

from lowbit.solvers.fitting import fit_blocks
from lowbit.solvers.registry import Call, Method, fit, solver

__all__ = ["Call", "Method", "fit", "fit_blocks", "solver"]
