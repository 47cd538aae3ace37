"""How far two models agree, in the figures that users of embeddings, labels and transcripts feel: formulas on numbers, without a model.

Standard errors are those of the delete-one jackknife over inputs (Tukey 1958; Efron and Stein 1981): with t_i the figure without
input i, of n inputs, the squared error is (n - 1) / n * sum_i (t_i - mean t)^2. Of a plain mean that is the usual standard error; of
figures in which every input meets all others, as where texts rank one another, it counts that one input moves many ranks. It does not suit
what jumps, such as which text is nearest (Efron and Tibshirani 1993, chapter 11); there queries count as independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lowbit.measure.quality import Estimate

_GROUPS = 64
Statistic = Callable[[np.ndarray], float]
"""The figure of the inputs of these numbers (int64 [m], in order)."""


def jackknife(statistic: Statistic, count: int) -> Estimate:
    """`statistic` of all `count` inputs with its standard error, None where leaving one out leaves less than two, or nothing to measure.

    Of more than 64 inputs groups are left out, 64 of them and neighbours together, so that it takes no longer.
    """
    every = np.arange(count)
    value = statistic(every)
    if count < 3:
        return Estimate(value)
    groups = np.array_split(every, min(count, _GROUPS))
    without = np.array([statistic(np.setdiff1d(every, group)) for group in groups])
    if not np.isfinite(without).all():
        return Estimate(value)
    n = len(groups)
    return Estimate(value, float(np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())))


def mean(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean of [n] independent values with its standard error, None for a single one."""
    found = np.asarray(values, dtype=np.float64)
    spread = float(found.std(ddof=1) / np.sqrt(len(found))) if len(found) > 1 else None
    return Estimate(float(found.mean()), spread)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of a [n, d] with the same row of b; 1 where both are zero, 0 where one is."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    alike = (np.linalg.norm(a, axis=1) == 0) & (np.linalg.norm(b, axis=1) == 0)
    return np.where(norms > 0, (a * b).sum(1) / np.where(norms > 0, norms, 1.0), alike.astype(np.float64))


def similarities(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of all rows of a [n, d] with all rows of b [m, d]: [n, m]."""
    return _unit(a) @ _unit(b).T


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, 1 for the smallest; equal values share the mean of their ranks."""
    x = np.atleast_2d(values)
    out = np.empty(x.shape)
    for row, place in zip(x.reshape(-1, x.shape[-1]), out.reshape(-1, x.shape[-1]), strict=True):
        _, first, counts = np.unique(row, return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        place[:] = (last - (counts - 1) / 2)[first]
    return out.reshape(np.shape(values))


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation of a and b [..., n] along the last axis: Pearson's correlation of their ranks (Spearman 1904).

    1 where neither tells its values apart, 0 where only one does.
    """
    left, right = (r - r.mean(-1, keepdims=True) for r in (ranks(a), ranks(b)))
    sizes = np.sqrt(np.square(left).sum(-1)), np.sqrt(np.square(right).sum(-1))
    product = sizes[0] * sizes[1]
    flat = ((sizes[0] == 0) & (sizes[1] == 0)).astype(np.float64)
    return np.where(product > 0, (left * right).sum(-1) / np.where(product > 0, product, 1.0), flat)


def others(matrix: np.ndarray) -> np.ndarray:
    """[n, n] -> [n, n - 1]: each row without its entry on the diagonal."""
    n = len(matrix)
    return matrix[~np.eye(n, dtype=bool)].reshape(n, n - 1)


def same_best(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether the largest value of each row is at the same place in a and b [n, m]: float64 [n] of 0 and 1."""
    return (a.argmax(1) == b.argmax(1)).astype(np.float64)


def shared_best(a: np.ndarray, b: np.ndarray, count: int) -> np.ndarray:
    """Of the `count` largest values of each row of a [n, m], the share that are among those of b: [n]."""
    count = min(count, a.shape[1])
    tops = [np.argsort(-x, axis=1, kind="stable")[:, :count] for x in (a, b)]
    return np.array([len(np.intersect1d(x, y)) / count for x, y in zip(*tops, strict=True)])


def edits(a: Sequence[object], b: Sequence[object]) -> int:
    """The fewest insertions, removals and changes that make b of a (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def word_agreement(found: Sequence[Sequence[object]], right: Sequence[Sequence[object]]) -> Estimate:
    """1 - the word error rate of the transcripts `found` beside `right`: edits over the words of `right`, of all inputs together.

    Where nothing was said by `right`, the words of `found` count as one error in one word.
    """
    wrong = np.array([edits(b, a) for a, b in zip(found, right, strict=True)], dtype=np.float64)
    words = np.array([len(b) for b in right], dtype=np.float64)

    def agreement(which: np.ndarray) -> float:
        count = words[which].sum()
        errors = wrong[which].sum()
        return 1.0 - errors / count if count else float(errors == 0)

    return jackknife(agreement, len(words))
