"""Figures of agreement beside their definitions, written out or tried by brute force, and beside golden numbers of scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lowbit.measure.agreement import (
    cosines,
    edits,
    jackknife,
    mean,
    others,
    ranks,
    same_best,
    shared_best,
    similarities,
    spearman,
    word_agreement,
)  # fmt: skip


def test_ranks_are_counts_of_what_is_smaller() -> None:
    random = np.random.default_rng(0)
    for values in (random.normal(size=9), random.integers(0, 4, 9).astype(float), np.zeros(4)):
        counted = [1 + (values < v).sum() + ((values == v).sum() - 1) / 2 for v in values]
        assert ranks(values).tolist() == counted


def test_spearman_is_scipys() -> None:
    """scipy.stats.spearmanr of scipy 1.17; the second has ties."""
    a, b = (
        np.array([106, 100, 86, 101, 99, 103, 97, 113, 112, 110.0]),
        np.array([7, 27, 2, 50, 28, 29, 20, 12, 6, 17.0]),
    )
    assert spearman(a, b) == pytest.approx(-0.17575757575757575, abs=1e-15)
    a, b = np.array([1, 2, 2, 3, 5, 5, 5, 0.5]), np.array([2, 1, 4, 4, 3, 8, 8, 0.0])
    assert spearman(a, b) == pytest.approx(0.7889568540593018, abs=1e-14)


def test_spearman_of_rows_without_ties_is_the_formula() -> None:
    random = np.random.default_rng(1)
    a, b = random.normal(size=(5, 20)), random.normal(size=(5, 20))
    d2 = np.square(ranks(a) - ranks(b)).sum(1)
    assert spearman(a, b) == pytest.approx(1 - 6 * d2 / (20 * (400 - 1)), abs=1e-12)
    assert spearman(a, a).tolist() == [1.0] * 5 and spearman(a, -a) == pytest.approx([-1.0] * 5)
    flat = np.zeros(4)
    assert spearman(flat, flat) == 1 and spearman(flat, np.arange(4.0)) == 0


def _fewest(a: tuple, b: tuple) -> int:
    """By recursion on the definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(_fewest(a[1:], b) + 1, _fewest(a, b[1:]) + 1, _fewest(a[1:], b[1:]) + (a[0] != b[0]))


def test_edits_by_brute_force() -> None:
    words = [w for n in range(4) for w in itertools.product("xyz", repeat=n)][::3]
    for a, b in itertools.product(words, words):
        assert edits(a, b) == _fewest(a, b)
    assert edits("kitten", "sitting") == 3


def test_word_agreement_is_of_all_words_together() -> None:
    right = [["the", "cat", "sat"], ["on"], ["a", "mat", "and", "a", "hat"]]
    found = [["the", "cat", "sat"], ["off", "it"], ["a", "mat", "and", "hat"]]
    assert word_agreement(found, right).value == pytest.approx(1 - (0 + 2 + 1) / 9)
    assert word_agreement([[], []], [[], []]).value == 1 and word_agreement([["x"]], [[]]).value == 0
    assert word_agreement(right, right).value == 1 and word_agreement(right, right).stderr == 0


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(2).normal(size=12)
    found = jackknife(lambda which: float(values[which].mean()), 12)
    plain = mean(values)
    assert found.value == pytest.approx(plain.value) and found.stderr == pytest.approx(plain.stderr, rel=1e-12)
    assert plain.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(12))
    assert jackknife(lambda which: 1.0, 2).stderr is None and mean([3.0]).stderr is None


def test_the_jackknife_of_many_inputs_leaves_out_groups() -> None:
    """Still about the standard error of a mean, at most 64 figures whatever the number of inputs."""
    values, asked = np.random.default_rng(3).normal(size=1000), []

    def statistic(which: np.ndarray) -> float:
        asked.append(len(which))
        return float(values[which].mean())

    found = jackknife(statistic, 1000)
    assert len(asked) == 65 and found.stderr == pytest.approx(mean(values).stderr, rel=0.3)


def test_cosines_by_hand() -> None:
    a, b = np.array([[3.0, 4.0], [0, 0], [0, 0], [1, 0]]), np.array([[4.0, 3.0], [0, 0], [1, 0], [-2, 0]])
    assert cosines(a, b) == pytest.approx([24 / 25, 1, 0, -1])
    assert similarities(a, b)[0] == pytest.approx([24 / 25, 0, 3 / 5, -3 / 5])


def test_nearest_texts_by_hand() -> None:
    matrix = np.array([[9.0, 1, 2], [3, 9, 4], [5, 6, 9]])
    assert others(matrix).tolist() == [[1, 2], [3, 4], [5, 6]]
    a, b = np.array([[1.0, 2, 3, 4], [4, 3, 2, 1]]), np.array([[1.0, 2, 4, 3], [1, 2, 3, 4]])
    assert same_best(a, b).tolist() == [0, 0] and same_best(a, a).tolist() == [1, 1]
    assert shared_best(a, b, 2).tolist() == [1, 0] and shared_best(a, b, 9).tolist() == [1, 1]
