"""guided: token weights against gradients taken by hand, and what they do to the statistics."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_calibrated import token_ids

import lowbit
from lowbit.blockwise.weightings import guided as module
from lowbit.errors import RecipeError
from lowbit.recipes.recipe import Recipe
from lowbit.solvers.stats import StatsBuilder
from tiny import tiny_model


def test_weights_are_mean_squared_gradients_of_what_the_layer_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), torch.stack(token_ids(3))
    monkeypatch.setattr(module, "_CLIPPED", 1.0)
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.weight"]
    found = module.guided(model, names, [ids[:2], ids[2:]], nullcontext(), seed=3)
    generator, expected = torch.Generator().manual_seed(3), {name: [] for name in names}
    for window in ids:
        outputs: dict[str, Any] = {}
        hooks = [
            model.get_submodule(n.removesuffix(".weight")).register_forward_hook(
                lambda m, args, y, n=n, outputs=outputs: outputs.__setitem__(n, y)
            )
            for n in names
        ]
        logp = model(window[None], use_cache=False).logits[0].log_softmax(-1)
        labels = torch.multinomial(logp.detach().exp(), 1, generator=generator)
        gradients = torch.autograd.grad(logp.gather(1, labels).sum(), [outputs[n] for n in names])
        for n, g in zip(names, gradients):
            expected[n].append(g[0].square().mean(-1))
        for hook in hooks:
            hook.remove()
    for name in names:
        whole = torch.cat(expected[name])
        assert torch.allclose(torch.cat(found[name]), whole / whole.mean(), rtol=1e-4)
        assert [len(part) for part in found[name]] == [48, 24]
    assert all(p.requires_grad for p in model.parameters())  # as it was


def test_weighted_moments_are_sums_of_weighted_products() -> None:
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(40, 300, generator=generator), torch.randn(40, 300, generator=generator)
    weights = torch.rand(40, generator=generator)
    builder = StatsBuilder(300, drift=True)
    builder.add(x, other, weights)
    stats = builder.stats()
    by_hand = sum(w * torch.outer(row, row) for w, row in zip(weights, x)) / 40
    assert torch.allclose(stats.second_moment, by_hand, atol=1e-4)
    drift = sum(w * torch.outer(f - row, row) for w, row, f in zip(weights, x, other)) / 40
    assert torch.allclose(stats.drift, drift, atol=1e-4)
    assert torch.equal(stats.absmax, x.abs().amax(0))


def test_guided_changes_the_codes_and_is_deterministic() -> None:
    recipe = "guided+qronos@int4:g16"
    made = [
        lowbit.quantize(tiny_model("llama"), r, calibration=token_ids(6)) for r in (recipe, recipe, "qronos@int4:g16")
    ]
    name = "model.layers.0.mlp.up_proj.weight"
    codes = [m.model.get_submodule(name).qtensor().codes for m in made]
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])
    assert Recipe.parse(str(made[0].plan.recipe)) == made[0].plan.recipe
    with pytest.raises(RecipeError, match="write it first"):
        Recipe.parse("gptq+guided@int4:g32")
