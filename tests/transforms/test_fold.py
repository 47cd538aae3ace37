"""Folding norms keeps the function of every family, and does what it says."""

from __future__ import annotations

import pytest
import torch
from variants import FAMILIES, family_source

from lowbit.errors import TransformError
from lowbit.transforms.arch import arch_of
from lowbit.transforms.check import check_function
from lowbit.transforms.fold import fold


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_folding_keeps_the_function(name: str, head: int) -> None:
    source = family_source(name)
    folded = fold(source, head=head)
    assert check_function(source, folded) < 1e-10
    changed = 0
    for norm in arch_of(source).norms:
        kept = not head and any(reader in source.inventory.tied for reader in norm.readers)
        weight = folded.read(norm.weight)
        expected = source.read(norm.weight) if kept else torch.full_like(weight, 0.0 if norm.plus_one else 1.0)
        assert torch.equal(weight, expected)
        changed += not kept
    assert changed >= (1 if name.startswith("olmo") else 3)  # OLMo 2 has none before its linears but the last


def test_a_linear_takes_the_weight_into_its_columns_and_the_bias_into_its_bias() -> None:
    source = family_source("phi")
    folded = fold(source, head=1)
    gamma, beta = (source.read(f"model.layers.1.input_layernorm.{x}") for x in ("weight", "bias"))
    weight, bias = (source.read(f"model.layers.1.mlp.fc1.{x}") for x in ("weight", "bias"))
    assert torch.allclose(folded.read("model.layers.1.mlp.fc1.weight"), weight * gamma[None, :], rtol=1e-14)
    assert torch.allclose(
        folded.read("model.layers.1.mlp.fc1.bias"), bias + (weight * beta[None, :]).sum(1), rtol=1e-12
    )
    assert not folded.read("model.layers.1.input_layernorm.bias").any()


def test_a_tied_head_is_left_alone_or_untied_and_both_are_said() -> None:
    source = family_source("llama-tied")
    plain, untied = fold(source), fold(source, head=1)
    assert "lm_head.weight" not in plain.tensors and plain.inventory.tied == source.inventory.tied
    assert any("not folded" in note and "fold(head=1)" in note for note in plain.notes)
    assert untied.tensors["lm_head.weight"].shape == (128, 32) and untied.inventory.tied == {}
    assert untied.inventory.params["lm_head.weight"].kind == "head"
    assert untied.config is not None and untied.config.tie_word_embeddings is False
    assert source.config is not None and source.config.tie_word_embeddings is True
    assert any("stored on its own" in note for note in untied.notes)
    gamma, shared = source.read("model.norm.weight"), source.read("model.embed_tokens.weight")
    assert torch.equal(untied.read("model.embed_tokens.weight"), shared)
    assert torch.allclose(untied.read("lm_head.weight"), shared * gamma, rtol=1e-14)


def test_a_bias_that_nothing_can_take_is_an_error_by_name() -> None:
    source = family_source("gpt2")
    source.read("transformer.ln_f.weight")[3] = 0  # shares memory with the model
    with pytest.raises(TransformError, match=r"transformer\.ln_f\.weight is zero in channel 3"):
        fold(source, head=1).read("transformer.ln_f.bias")
    source.read("transformer.ln_f.bias")[3] = 0
    folded = fold(source, head=1)
    assert folded.read("transformer.ln_f.bias")[3] == 0
    assert check_function(source, folded) < 1e-10
