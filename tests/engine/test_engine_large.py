"""Channels in the ten thousands: the engine beside transformers in float32, on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import apart, build_model, reference, tokens

import lowbit
from lowbit import Engine
from tiny import tiny_tokenizer

HEADS, KEY_HEADS, SIZE = 4, 2, 32
WHERE = ("stream", "hidden", "norm", "keys", "queries", "values", "head")


def grown(where: str, big: float) -> Any:
    """A model of which some channels are large at one place; what reads them makes up for it."""
    model = build_model("llama")
    layers = model.model.layers
    with torch.no_grad():
        for layer in layers:
            attention, mlp = layer.self_attn, layer.mlp
            q = attention.q_proj.weight.view(HEADS, SIZE, -1)
            k, v = (p.weight.view(KEY_HEADS, SIZE, -1) for p in (attention.k_proj, attention.v_proj))
            pair = [3, 3 + SIZE // 2]  # turned together
            if where == "hidden":
                mlp.up_proj.weight[::48] *= big
                mlp.down_proj.weight[:, ::48] /= big
            elif where == "norm":
                layer.input_layernorm.weight[::16] *= big
                for part in (attention.q_proj, attention.k_proj, attention.v_proj):
                    part.weight[:, ::16] /= big
            elif where in ("keys", "queries"):
                large, small = (k, q) if where == "keys" else (q, k)
                large[:, pair] *= big
                small[:, pair] /= big
            elif where == "values":
                v[:, 5] *= big
                attention.o_proj.weight.view(-1, HEADS, SIZE)[:, :, 5] /= big
        if where == "stream":
            layers[0].mlp.down_proj.weight[7] *= big / 5
        elif where == "head":
            model.model.norm.weight[9] *= big
            model.lm_head.weight[:, 9] /= big
    return model


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("big", [1e3, 1e4, 1e6])
def test_a_float_model_with_large_channels(where: str, big: float) -> None:
    model, ids = grown(where, big), tokens(40)
    true = reference(model, ids)
    for cache, bound in (("int16", 0.01), ("int8", 0.1)):
        engine = Engine.open(model, threads=1, cache=cache)
        whole = engine.logits(ids)
        assert apart(whole, true) < bound, (cache, apart(whole, true))
        assert torch.equal(engine.logits(ids, chunk=9), whole) and torch.equal(engine.logits(ids, chunk=1), whole)


@pytest.mark.parametrize("recipe", ["w8", "w4", "nl4"])
@pytest.mark.parametrize("where", ["hidden", "norm", "values"])
def test_packed_weights_behind_large_channels(tmp_path: Path, recipe: str, where: str) -> None:
    folder, ids = tmp_path / "packed", tokens(40)
    lowbit.quantize(grown(where, 1e4), recipe, folder, tokenizer=tiny_tokenizer())
    true = reference(lowbit.load(folder, dtype="float32", kernel="expand"), ids)
    assert apart(Engine.open(folder, threads=1).logits(ids), true) < 0.01


def test_sequences_side_by_side_with_large_channels_are_what_each_is_alone() -> None:
    engine = Engine.open(grown("keys", 1e4), threads=2)
    prompts = [tokens(50), tokens(7, seed=1), tokens(23, seed=2)]
    together = [r.tokens for r in engine.generate(prompts, max_new_tokens=8)]
    assert together == [engine.generate(p, max_new_tokens=8).tokens for p in prompts]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_comes_out_as_such(bad: float) -> None:
    """As in transformers, and for the tokens that see it only."""
    model, ids = build_model("llama"), tokens(20)
    with torch.no_grad():
        model.model.embed_tokens.weight[ids[11], 5] = bad
    first = ids.index(ids[11])
    found = Engine.open(model, threads=1).logits(ids)
    assert torch.isfinite(found[:first]).all() and torch.isnan(found[first:]).all()
