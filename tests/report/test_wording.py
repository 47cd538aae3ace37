"""Wording: exact texts."""

from __future__ import annotations

import pytest

from lowbit.report.wording import (
    bytes_text,
    count_text,
    fitting,
    grouped,
    number_text,
    pattern_of,
    span_text,
    sparkline,
)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1024, "1 KiB"), (1000, "0.977 KiB"), (88_423_080, "84.3 MiB"), (538_060_800, "513 MiB"),
     (1 << 30, "1 GiB"), (99.96 * 2**20, "100 MiB"), (7 << 50, "7168 TiB")],
)  # fmt: skip
def test_bytes(nbytes: float, text: str) -> None:
    assert bytes_text(nbytes) == text


def test_counts_and_numbers() -> None:
    assert [count_text(n) for n in (576, 26784, 134_515_008, 70_600_000_000)] == [
        "576",
        "26 784",
        "134.5 M",
        "70.6 B",
    ]
    assert [number_text(v) for v in (-0.0, 0.1, -0.30000001192)] == ["0", "0.1", "-0.3"]


def test_names_of_a_group() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.w" for i in range(3) for j in (0, 2)]
    assert {pattern_of(n) for n in names} == {"model.layers.*.mlp.experts.*.w"}
    assert span_text(names) == "model.layers.{0-2}.mlp.experts.{0..2}.w"
    assert span_text(["lm_head.weight"]) == "lm_head.weight"
    assert grouped([1, 2, 3, 4, 5], lambda n: n % 2) == [[1, 3, 5], [2, 4]]


def test_a_sparkline_has_a_bar_for_each_count_and_a_gap_for_none() -> None:
    assert sparkline([0, 1, 15, 30, 60]) == " ▁▃▅█"
    assert sparkline([0, 0]) == "  "


def test_columns_go_in_the_order_named_until_the_rest_fits() -> None:
    headings, rows = ["a", "bb", "c"], [["x" * 10, "y" * 5, "z"]]
    assert fitting(headings, rows, 100, ("c", "bb")) == [0, 1, 2]
    assert fitting(headings, rows, 20, ("c", "bb")) == [0, 1]
    assert fitting(headings, rows, 16, ("c", "bb")) == [0]
