"""Scales that a transform chose are kept where the block is nearer to the float one with them, and nowhere else."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import lowbit
from lowbit.blockwise.rewriter import Rewriter
from lowbit.errors import RecipeError
from lowbit.transforms.smooth import smooth
from tiny import tiny_model

IDS = torch.randint(3, 120, (4, 48), generator=torch.Generator().manual_seed(3))
TEXT: dict[str, Any] = {"calibration": [row[None] for row in IDS], "samples": 4, "length": 48}


def model(name: str, seed: int) -> Any:
    made = tiny_model(name, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # channels of different size, as models have them
        for tensor_name, p in made.named_parameters():
            if "norm" in tensor_name:
                p.copy_(torch.exp(0.8 * torch.randn(p.shape, generator=generator)))
    return made


def first_block(module: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=ids, output_hidden_states=True).hidden_states[1].float()


@pytest.mark.parametrize(
    ("name", "recipe"),
    [(n, "awq+{}@int4:g32,embed=keep") for n in ("mixtral", "llama")]
    + [("qwen3-moe", "smooth(points=4)+{}@int4:channel,embed=keep")],
)
def test_a_block_is_never_worse_than_without_scaling(name: str, recipe: str) -> None:
    helped = 0
    for seed in range(2):
        float_model = model(name, seed)
        right = first_block(float_model)
        errors = []
        for text in (recipe.format("absmax"), recipe.partition("+")[2].format("absmax")):
            options = TEXT if "+" in text else {}
            made = lowbit.quantize(float_model, text, **options).model
            errors.append(float((first_block(made) - right).norm() / right.norm()))
        assert errors[0] <= errors[1] * 1.002, (seed, errors)
        helped += errors[0] < 0.97 * errors[1]
    assert helped, "scaling helped nowhere, so that nothing was tried"


def test_a_worse_choice_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With scales that spoil every block the result is that without any: norms, codes and all."""
    room = importlib.import_module("lowbit.transforms.awq")

    def spoiled(mean_abs: torch.Tensor, alpha: float) -> torch.Tensor:
        return torch.logspace(-3, 3, len(mean_abs)) if alpha else torch.ones_like(mean_abs)

    monkeypatch.setattr(room, "_normalised", spoiled)
    monkeypatch.setattr(room, "quadratic", lambda error, moment: -float(error.norm()))  # the worst wins
    float_model = model("mixtral", 0)
    scaled = lowbit.quantize(float_model, "awq+absmax@int4:g32,embed=keep", **TEXT).model.state_dict()
    plain = lowbit.quantize(float_model, "absmax@int4:g32,embed=keep").model.state_dict()
    assert all(torch.equal(scaled[k], plain[k]) for k in plain if k.endswith(("codes", "norm.weight")))


def test_who_chooses() -> None:
    from lowbit.interchange.opening import open_source
    from lowbit.recipes.recipe import Recipe

    source = open_source(tiny_model("llama"))
    for text, chooses in {
        "awq@int4:g32": True, "smooth@int8:channel": False, "smooth(points=4)@int8:channel": True,
    }.items():  # fmt: skip
        rewriter = Rewriter.of(source, Recipe.parse(text))
        assert rewriter is not None and rewriter.chooses == chooses


def test_smooth_scales_nothing_where_no_exponent_helps() -> None:
    from lowbit.solvers.stats import StatsBuilder

    builder = StatsBuilder(64)
    builder.add(torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).sign())
    weight = torch.ones(16, 64)
    weight[0, 0] = 4.0
    found = smooth([weight], builder.stats(), lambda w, stats: w, points=4)
    assert found.error <= found.plain
    with pytest.raises(RecipeError):
        smooth([weight], builder.stats(), lambda w, stats: w, points=4, alpha=0.3)
