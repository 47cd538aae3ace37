"""explain against the numbers that the seed documents print, and against the library's own results."""

from __future__ import annotations

import json

import pytest
import torch

from lowbit.errors import WeightError
from lowbit.recipes.presets import PRESETS
from lowbit.recipes.recipe import Recipe
from lowbit.report.explain import explain, parse_array
from lowbit.report.explain_view import render_explanation

SEED = "[-0.3, 0., 0.1, 0.7]"


def explained(text: str, recipe: str):
    return explain(parse_array(text), Recipe.parse(recipe))


def test_absmax_shows_the_levels_of_seed_000() -> None:
    (block,) = explained(SEED, "absmax").blocks
    assert block.levels == (-54, 0, 18, 127)
    assert block.steps[0].symbol == "s" and block.offset is None
    assert str(block.steps[0]) == "s = max|x| / highest level = 0.7 / 127 = 0.005511811"


def test_zeropoint_shows_the_zero_point_of_seed_000() -> None:
    (block,) = explained(SEED, "zeropoint").blocks
    scale, zero = block.steps
    assert scale.value == pytest.approx(1 / 255) and zero.value == pytest.approx(-51.5, abs=1e-4)
    assert block.offset == zero.stored == -52
    assert block.levels[1] == -52, "zero is exactly the zero-point"


def test_symmetric_and_mx_put_their_numbers_into_their_own_formulas() -> None:
    (block,) = explained(SEED, "symmetric").blocks
    assert block.steps[0].value == pytest.approx(0.7 / 127.5)
    assert block.steps[0].numbers == "2 * 0.7 / (127 - (-128))"
    (block,) = explained(SEED, "mxfp4").blocks
    assert block.steps[0].value == 0.125 and block.steps[0].numbers.endswith("2^(-1 - 2)")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_explained_by_what_the_library_does(preset: str) -> None:
    recipe = Recipe.parse(preset)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    found = explain(x, recipe, elements=10_000)
    q = recipe.solver_for(recipe.format)(x, recipe.format, recipe.fit_for(recipe.format))
    after = torch.full_like(x, torch.nan)
    for block in found.blocks:
        (r0, r1), (c0, c1) = block.rows, block.columns
        after[r0:r1, c0:c1] = torch.tensor(block.dequantized).view(r1 - r0, c1 - c0)
        assert torch.equal(torch.tensor(block.values).view(r1 - r0, c1 - c0), x[r0:r1, c0:c1])
        # What is read back is what the shown formula says of the shown, stored numbers.
        stored = {step.symbol: step.stored for step in block.steps}
        level = torch.tensor(block.levels, dtype=torch.float64)
        s = stored.get("s", 1.0)
        value = s * level + stored["m"] if "m" in stored else s * (level - stored.get("z", 0.0))
        torch.testing.assert_close(value.float(), torch.tensor(block.dequantized), rtol=1e-5, atol=1e-6)
    assert torch.equal(after, q.dequantize()), "the blocks together are the whole array"
    error = (q.dequantize() - x).double()
    assert found.max_error == pytest.approx(float(error.abs().max()))
    assert found.rms_error == pytest.approx(float(error.square().mean().sqrt()))
    assert found.relative_error == pytest.approx(float(error.norm() / x.double().norm()))
    assert found.bits_per_weight == q.bits_per_weight
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("fmt", ["int4:g8", "uint8:channel:asym", "int8:tensor:zero=fp32", "uint4:g16:min=fp16"])
def test_scaled_rounds_to_the_level(fmt: str) -> None:
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
    for block in explain(x, Recipe.parse(fmt)).blocks:
        scaled = torch.tensor(block.scaled)
        grid = Recipe.parse(fmt).format.grid
        assert torch.equal(grid.round(scaled), torch.tensor(block.levels))


def test_the_range_is_widened_where_the_zero_point_is_on_the_grid() -> None:
    (block,) = explained("[1.0, 2.0, 3.0]", "minmax@uint8:tensor:asym").blocks
    assert block.steps[0].numbers == "(3 - 0) / (255 - 0)"
    assert "widened" in block.steps[0].note and block.steps[0].value == pytest.approx(3 / 255)


def test_a_constant_block_says_so_and_is_exact() -> None:
    found = explained("[0.7, 0.7, 0.7]", "absmax")
    assert "exactly" in found.blocks[0].steps[0].note and found.max_error < 1e-8


def test_rows_choose_blocks_and_elements_limit_values() -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    found = explain(x, Recipe.parse("int4:g32"), rows=2, elements=5)
    assert [(b.rows, b.columns) for b in found.blocks] == [((0, 1), (0, 32)), ((1, 2), (0, 32))]
    assert found.block_count == 12 and all(len(b.values) == 5 and b.count == 32 for b in found.blocks)
    assert len(explain(x, Recipe.parse("int8:tensor"), rows=3).blocks) == 1


def test_learned_levels_are_shown() -> None:
    found = explained("[[0, 1, 2, 3], [4, 5, 6, 7]]", "kmeans2:channel")
    assert [b.learned for b in found.blocks] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert found.max_error == 0


@pytest.mark.parametrize("text", ["[1, oops]", "[[1, 2], [3]]", "[]", "5", "['a']", "[" * 500, "[1, __import__('os')]"])
def test_what_is_no_array_is_an_error(text: str) -> None:
    with pytest.raises(WeightError, match="array"):
        parse_array(text)


def test_values_that_are_not_finite_are_an_error_with_the_name() -> None:
    with pytest.raises(WeightError, match=r"w: 1 of 2 values"):
        explain(torch.tensor([1.0, torch.inf]), Recipe.parse("absmax"), label="w")


def test_the_drawing_holds_the_numbers() -> None:
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as capture:
        console.print(render_explanation(explained(SEED, "zeropoint")))
    text = capture.get()
    assert "kept in int32 as -52" in text and "-0.298039" in text and "||x' - x||" in text
