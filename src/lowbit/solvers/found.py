"""What a solver found: the quantized weight, and what it measured on the way."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.formats import QTensor


@dataclass(frozen=True)
class Trace:
    """Squared output error per token of one solver call: of round-to-nearest, of the result; the damping it took."""

    start: float
    end: float
    damp: float


@dataclass(frozen=True)
class Found:
    """`trace`: None of a solver that does not measure the error of the layer's output. `squares`: |w|^2 and |w - w_q|^2 of the
    weight that the solver was given, where it measured them on the way."""

    weight: QTensor
    trace: Trace | None = None
    squares: tuple[float, float] | None = None
