"""k-means: the learned levels from the start to the end."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.report.at_work.case import Case
from lowbit.report.at_work.trace import OF_WEIGHTS, Listing, Outcome, Shown, Trace, shown_of, shows
from lowbit.solvers import Call

EXAMPLE = (
    "[-0.91, -0.62, -0.55, -0.47, -0.4, -0.31, -0.28, -0.22, -0.19, -0.13, -0.1, -0.06, -0.02, 0.01, 0.05, 0.08, 0.14, 0.17, "
    "0.25, 0.29, 0.36, 0.43, 0.58, 0.97]"
)


def start(x: Tensor, v: Tensor, count: int) -> Tensor:
    """float64 [count]: levels as dense as the cube root of the density of the sorted values x [n] of weights v [n]."""
    if len(x) < 2:
        return x.expand(count).clone()
    share = ((v[1:] + v[:-1]) / 2) ** (1 / 3) * x.diff() ** (2 / 3)
    until = torch.cat([share.new_zeros(1), share.cumsum(0)])
    levels = []
    for i in range(count):
        wanted = float(until[-1]) * (i + 0.5) / count
        at = min(max(int((until < wanted).sum()), 1), len(x) - 1)
        gap = float(until[at] - until[at - 1])
        part = (wanted - float(until[at - 1])) / gap if gap > 0 else 0.5
        levels.append(float(x[at - 1]) + part * float(x[at] - x[at - 1]))
    return torch.tensor(levels, dtype=torch.float64)


def rounds(x: Tensor, v: Tensor, levels: Tensor, most: int) -> list[tuple[Tensor, float]]:
    """Lloyd's iteration: each value goes to its nearest level, each level to the mean of its values. (levels, error) of each."""
    found: list[tuple[Tensor, float]] = []
    for _ in range(most + 1):
        nearest = (x[:, None] - levels).abs().argmin(1)
        found.append((levels, float((v * (x - levels[nearest]) ** 2).sum())))
        moved = levels.clone()
        for k in range(len(levels)):
            mine = nearest == k
            if float(v[mine].sum()) > 0:
                moved[k] = (v[mine] * x[mine]).sum() / v[mine].sum()
        if torch.equal(moved, levels):
            break
        levels = moved
    return found


def _counted(count: int) -> str:
    return "1 iteration" if count == 1 else f"{count} iterations"


@shows("kmeans", example=EXAMPLE)
def kmeans(case: Case, call: Call) -> Shown | None:
    """Levels by iteration for the first set of them, then what the solver found."""
    fmt, book = case.format, case.format.codebook
    assert book is not None
    q = case.solved()
    rows, cols = (size if b == -1 else b for b, size in zip((book.rows, book.cols), case.weight.shape))
    values, weights = case.weight[:rows, :cols], torch.ones_like(case.weight)[:rows, :cols]
    if case.known is not None:
        weights = case.known.importance.expand(case.weight.shape)[:rows, :cols]
    if fmt.scale is not None:
        said = "The weights are divided by the scale of their block first, and the levels are learned from all of them."
        outcome = Outcome.of(q.unpacked(), q.dequantize(), ())
        return Shown(Trace(str(call), (said,), outcome), case)
    x, order = values.reshape(-1).double().sort()
    v = weights.reshape(-1).double()[order]
    most = int({**call.method.options, **dict(call.options)}["iterations"])
    found = rounds(x, v, start(x, v, fmt.grid.cardinality), most)
    final = q.codebooks()[0, 0, 0].double()
    nearest = (x[:, None] - final).abs().argmin(1)
    last = float((v * (x - final[nearest]) ** 2).sum())
    heads = tuple(f"level {k}" for k in range(len(final)))
    table = [(str(i), error, *levels.tolist()) for i, (levels, error) in enumerate(found)]
    table.append(("kept", last, *final.tolist()))
    some = tuple(i for i in range(len(table)) if i < 3 or i >= len(table) - 2)
    parts: list[str | Listing] = [
        f"Every row has {len(final)} levels of its own, learned from its weights"
        + (", each counted by the mean square of its input" if case.known is not None else "")
        + ". They start close together where weights are many. Then, again and again: each weight goes to its nearest level, "
        "and each level moves to the mean of its weights. Last, levels that are hardly used move to where errors are "
        f"largest, as long as that helps; here after {_counted(len(found) - 1)}{shown_of(len(some), len(table))}. `kept` is what is "
        f"stored (in {fmt.levels_store}):",
        Listing("levels", ("iteration", "error", *heads), tuple(table), some),
    ]
    distinct = len(x.unique())
    if distinct <= len(final):
        parts.append(
            f"The row has {distinct} different values, so that each has a level of its own and comes back as {fmt.levels_store} "
            "holds it."
        )
    spare = len(final) - len(nearest.unique())
    if spare:
        parts.append(f"{spare} of the {len(final)} levels serve no value of this row.")
    errors = (("levels as they start", found[0][1]), (str(call), last))
    return Shown(Trace(str(call), tuple(parts), Outcome.of(q.unpacked(), q.dequantize(), errors, OF_WEIGHTS)), case)
