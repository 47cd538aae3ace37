"""Tables, lists and boxes: measured in cells, at every width."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from lowbit.report.boxed import Boxed
from lowbit.report.layout import headline, named_lines, table_or_list, wrapped

WIDTHS = (60, 80, 100, 140)
LONG = (
    "rotate+awq+qronos@uint3:g32:s=(uint6:g8):min=(int6:g8),a=minmax@int8:tensor,a:*.down_proj=int8:g64,fallback=never"
)
HEADINGS = ["recipe", "bits/\nweight", "what it is", "MiB"]
ROWS = [["w4", "4.50", "the one to start with", "84.3"], ["gptq@int4:g64", "4.25", "", "81"]]


def lines_of(item: object, width: int) -> list[str]:
    """What is printed in so many columns, without cropping, as the commands print."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(item, crop=False)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


def widest(lines: list[str]) -> int:
    return max(map(cell_len, lines))


def test_text_wraps_between_words_and_a_long_word_has_a_line_of_its_own() -> None:
    text = f"made by {LONG} on   two cores\n  indented"
    for width in (10, *WIDTHS):
        lines = [line.plain for line in wrapped(text, width)]
        assert " ".join(lines).split() == text.split()
        assert all(cell_len(line) <= width or line == LONG for line in lines)
    assert [line.plain for line in wrapped("", 10)] == [""]
    assert [line.plain for line in wrapped("  two words", 7)] == ["  two", "words"]


def test_wrapping_counts_cells_and_keeps_styles() -> None:
    lines = wrapped(Text.assemble(("漢字漢字 ", "red"), "漢字"), 9)
    assert [line.plain for line in lines] == ["漢字漢字", "漢字"]
    assert lines[0].spans[0].style == "red" and not lines[1].spans


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_that_fit_are_a_table_in_columns(width: int) -> None:
    lines = lines_of(table_or_list(HEADINGS, ROWS, width, left=HEADINGS[::2]), width)
    assert [line.split() for line in lines if line.strip("─ ")][:2] == [
        ["bits/"],
        ["recipe", "weight", "what", "it", "is", "MiB"],
    ]
    first, second = (next(line for line in lines if row[0] in line) for row in ROWS)
    assert first.index("84.3") + 4 == second.index("81") + 2, "numbers end below each other"
    assert widest(lines) <= width


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", [LONG, "漢" * 29, "short"])
def test_a_name_is_whole_on_one_line_and_every_cell_is_shown(width: int, name: str) -> None:
    rows = [*ROWS, [name, "3.50", "a text of several words that is long enough to be wrapped " * 3, "70"]]
    lines = lines_of(table_or_list(HEADINGS, rows, width, left=HEADINGS[::2]), width)
    assert any(line.strip().split("  ")[0] == name for line in lines)
    assert not any("…" in line for line in lines)
    words = " ".join(lines).split()
    assert words.count("wrapped") == 3 and words.count("several") == 3
    for row in rows:
        assert set(row[1].split()) <= set(words) and row[3] in words
    assert all(cell_len(line) <= width or line == name for line in lines)


def test_a_list_names_its_values_and_leaves_empty_ones_out() -> None:
    lines = lines_of(table_or_list(HEADINGS, [[LONG, "3.50", "", "70"]], 80), 80)
    assert lines[1:3] == [LONG, "  bits/weight 3.50  MiB 70"]


def test_a_long_value_of_a_list_stands_below_its_name() -> None:
    lines = lines_of(table_or_list(["tensor", "becomes"], [["a.weight", LONG]], 80), 80)
    assert lines[1:4] == ["a.weight", "  becomes", f"    {LONG}"]


def test_a_table_goes_without_what_is_expendable_before_it_becomes_a_list() -> None:
    rows = [[f"{'name' * 10}", "1.00", "text", "70"]]
    lines = lines_of(table_or_list(HEADINGS, rows, 60, expendable=("MiB",)), 60)
    assert "text" in lines[-2] and "70" not in lines[-2] and lines[-2].startswith("name")


@pytest.mark.parametrize("width", WIDTHS)
def test_named_lines_break_no_word(width: int) -> None:
    pairs = [("recipe", f"w3 = {LONG}"), ("size", "513 MiB became 84.3 MiB, which is 6.1 times smaller, at the end")]
    lines = lines_of(named_lines(pairs), width)
    assert any(line.strip().endswith(LONG) for line in lines)
    assert " ".join(lines).split() == ["recipe", "w3", "=", LONG, "size", *pairs[1][1].split()]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_headline_has_the_recipe_whole(width: int) -> None:
    lines = lines_of(headline("some-model", LONG, width), width)
    assert any(LONG in line for line in lines) and lines[0].startswith("some-model")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("recipe", ["w4", LONG[:70], LONG])
@pytest.mark.parametrize("value", ["84.3 MiB", LONG[:50], LONG])
def test_a_box_cuts_nothing(width: int, recipe: str, value: str) -> None:
    footer = Text("Linux x86_64, a processor with a name that is rather long, 2 cores, 2 threads, torch 2.13.0")
    box = Boxed(named_lines([("measured on", value)]), Text(f"model  {recipe}"), footer=footer, colour="red")
    lines = lines_of(box, width)
    text = "\n".join(lines)
    assert "…" not in text and recipe in text and value in text
    assert "2.13.0" in text
    whole = {recipe, value}
    assert all(cell_len(line) <= width or line.strip("│ ") in whole for line in lines)
