"""Positions: every scaling with odd but legal values, and LongRoPE while a text grows, against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_models import MODELS, apart, build_model, reference, save_model, tokens

from lowbit import Engine
from lowbit.engine.generation import Sampling

THETA = {"rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "linear below one": ("llama", {**THETA, "rope_type": "linear", "factor": 0.5}),
    "llama3 without the original length": ("llama", {**THETA, **LLAMA3}),
    "llama3, a steep ramp": ("llama", {**THETA, **LLAMA3, "original_max_position_embeddings": 64, "high_freq_factor": 1.01}),
    "yarn without the original length": ("llama", {**THETA, "rope_type": "yarn", "factor": 4.0}),
    "yarn with a factor of attention": ("llama", {
        **THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 0.7}),
    "yarn with betas": ("llama", {
        **THETA, "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 4.0, "beta_slow": 0.5,
        "truncate": False}),
    "yarn with one mscale": ("llama", {
        **THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7}),
    "yarn with a narrow ramp": ("llama", {
        **THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 1.001,
        "beta_slow": 1.0, "truncate": False}),
    "yarn below one": ("llama", {**THETA, "rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 64}),
    "a share that Llama does not know": ("llama", {**THETA, "rope_type": "default", "partial_rotary_factor": 0.5}),
    "qwen2, yarn": ("qwen2", {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    "gemma3, one kind of layers scaled": ("gemma3_text", {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 500.0, "rope_type": "default"}}),
    "phi3, an odd share": ("phi3", {**THETA, "rope_type": "default", "partial_rotary_factor": 0.75}),
    "phi3, longrope with factors of attention": ("phi3-long", {
        **MODELS["phi3-long"][1]["rope_parameters"], "attention_factor": 1.3}),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_odd_values_of_every_scaling(case: str) -> None:
    name, rope = ODD[case]
    model = build_model(name, rope_parameters=rope)
    for length in (20, 150):
        ids = tokens(length, length)
        assert apart(Engine.open(model, threads=1).logits(ids), reference(model, ids)) < 2e-3, length


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Engine]:
    """A model with other frequencies for texts of more than 128 tokens, and an engine for it."""
    folder = tmp_path_factory.mktemp("long")
    save_model("phi3-long", folder)
    return build_model("phi3-long"), Engine.open(folder, threads=1)


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """By transformers, up to the end token."""
    with torch.inference_mode():
        made = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    found: list[int] = made[0, len(ids) :].tolist()
    return found


def test_longrope_tokens_are_those_of_transformers_whatever_is_asked_for(growing: tuple[Any, Engine]) -> None:
    model, engine = growing
    prompts = [tokens(n, n) for n in (100, 20, 128, 140)]  # grows long, stays short, is about to, is long
    right = [greedy(model, ids, 50) for ids in prompts]
    assert [len(r) for r in right].count(50) > 2, "the end token came too soon for this test"
    for count in (50, 20, 1):
        found = engine.generate(prompts, max_new_tokens=count)
        assert [f.tokens for f in found] == [r[:count] for r in right], count
    assert list(engine.generate(prompts[0], max_new_tokens=900).tokens)[:50] == right[0]
    found = engine.generate(prompts, max_new_tokens=50, batch=2)
    assert [f.tokens for f in found] == right


def test_logits_of_chunks_know_how_long_the_text_is(growing: tuple[Any, Engine]) -> None:
    model, engine = growing
    for length in (128, 129):
        ids = tokens(length, length)
        for chunk in (7, 512):
            assert apart(engine.logits(ids, chunk=chunk), reference(model, ids)) < 2e-3, (length, chunk)


def test_a_kept_cache_is_read_again_where_a_text_becomes_long_or_short(growing: tuple[Any, Engine]) -> None:
    model, engine = growing
    cache = engine.kv_cache(1, 400)
    kept, was_long = 0, False
    for length in (100, 120, 150, 90):  # turns of a conversation; the last has begun anew
        ids = tokens(160, 1)[:length]
        running = engine.running(0, ids, 12, (), Sampling())
        running.slot = 0
        running.done, running.long = min(kept, length - 1), was_long
        list(engine.run([running], Sampling(), cache))
        assert running.ids[length:] == greedy(model, ids, 12), length
        kept, was_long = length, running.long


def test_other_classes_than_phi3_read_longrope_too() -> None:
    rope = {**THETA, "rope_type": "longrope", "original_max_position_embeddings": 64,
            "short_factor": [1.0 + 0.1 * i for i in range(16)], "long_factor": [2.0 + i for i in range(16)]}  # fmt: skip
    model = build_model("llama", rope_parameters=rope)
    for length in (60, 100):
        ids = tokens(length)
        assert apart(Engine.open(model, threads=1).logits(ids), reference(model, ids)) < 2e-3
