"""Odd groups say at once what they do, and what is said is so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.formats import parse_format
from lowbit.formats.blocks import regions
from lowbit.kernels.layout import why_not
from lowbit.planning.advice import _nearby, _of_group
from lowbit.recipes.presets import PRESETS


def test_an_odd_group_says_what_it_does_once(tiny_folder: Callable[[str], Path]) -> None:
    found = lowbit.plan(tiny_folder("llama"), "int4:g12,embed=keep").advice
    assert len(found) == 1
    assert "groups of 12 do not divide rows of" in found[0] and "nothing is padded" in found[0]
    assert "multiple of 16" in found[0] and re.search(r"g16 (and g32 )?divides? every row here", found[0])
    proposed = lowbit.plan(tiny_folder("llama"), "int4:g16,embed=keep")
    assert proposed.advice == () and lowbit.plan(tiny_folder("llama"), "w4").advice == ()
    assert lowbit.plan(tiny_folder("llama"), "int4:g12").to_json()["advice"]


@pytest.mark.parametrize(("group", "width"), [(30, 576), (100, 576), (100, 1536), (80, 576), (7, 32)])
def test_what_is_said_of_the_last_group_is_so(group: int, width: int) -> None:
    said = _of_group(group, [width], width)
    last = int(re.search(r"has only (\d+) weights", said)[1])  # type: ignore[index]
    fmt = parse_format(f"int4:g{group}")
    spans = list(regions((4, width), fmt.block))
    assert [r.c1 - r.c0 for r in spans][-1] == last and spans[-1].c == last
    q = lowbit.quantize_tensor(torch.randn(4, width), f"int4:g{group}")
    assert q.dequantize().shape == (4, width)
    assert (why_not(q) is not None) == ("multiple of 16" in said)  # the engine expands exactly these
    for near in re.findall(r"g(\d+)", said.partition("; g")[2]):
        assert width % int(near) == 0


def test_groups_that_divide_and_presets_say_nothing() -> None:
    assert _of_group(32, [576, 1536], 192) == "" == _of_group(48, [576, 1536], 192)
    assert _nearby(30, 192) == [16, 32] and _nearby(100, 192) == [96, 192] and _nearby(1000, 192) == [192]
    assert _nearby(30, 7) == [] and _nearby(30, 24) == [24] and _nearby(3, 10) == [10]


@pytest.mark.parametrize("recipe", ["int4", "int3:channel", "gptq@uint4", "fp4"])
def test_one_scale_for_a_row_in_few_bits_is_said(recipe: str, tiny_folder: Callable[[str], Path]) -> None:
    (said,) = lowbit.plan(tiny_folder("llama"), recipe).advice
    assert "one scale for a whole row" in said and ":g32" in said


@pytest.mark.parametrize("recipe", [*PRESETS, "int8", "fp8", "kmeans4:channel", "int4:g32"])
def test_usual_recipes_say_nothing(recipe: str, tiny_folder: Callable[[str], Path]) -> None:
    assert lowbit.plan(tiny_folder("llama"), recipe).advice == ()
