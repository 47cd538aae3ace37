"""Rotations keep the function of every family, alone and together, and do spread outliers."""

from __future__ import annotations

import pytest
import torch
from variants import FAMILIES, family_source, random_source

from lowbit.errors import RecipeError, TransformError
from lowbit.transforms.arch import arch_of
from lowbit.transforms.check import check_function
from lowbit.transforms.fold import fold
from lowbit.transforms.hadamard import rotation_for
from lowbit.transforms.rotate import rotate

CHOICES = [{"r1": 1, "r2": 0}, {"r1": 0, "r2": 1}, {"r1": 0, "r2": 0, "r4": 1}, {"r4": 1, "seed": 3}]


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_rotating_keeps_the_function(name: str, options: dict[str, int]) -> None:
    source = family_source(name)
    if arch_of(source).post_norms and options.get("r1", 1):
        with pytest.raises(TransformError, match=r"post_attention_layernorm.*r1=0"):
            rotate(source, **options)
        return
    arch = arch_of(source)
    if options.get("r4") and not arch.seconds:
        with pytest.raises(TransformError, match="inputs of experts"):
            rotate(source, **options)
        options = {**options, "r4": 0, "r2": 1}
    turned = rotate(source, **options)
    assert check_function(source, turned) < 1e-10
    changed = {n for n in source.tensors if not torch.equal(turned.read(n), source.read(n))}
    expected = set()
    if options.get("r1", 1):
        expected |= set(arch.writers) | {r for n in arch.norms for r in n.readers if r in source.tensors}
    if options.get("r2", 1):
        expected |= {link.producer for link in arch.links if link.is_values}
    if options.get("r4"):
        expected |= set(arch.seconds)
        assert set(turned.online) == set(arch.seconds)
    assert expected and expected <= changed


def test_rotating_nothing_is_an_error() -> None:
    with pytest.raises(RecipeError, match="rotates nothing"):
        rotate(family_source("llama"), r1=0, r2=0)


def outlier_ratio(x: torch.Tensor) -> float:
    """Largest entry over the root mean square."""
    return float(x.abs().max() / x.square().mean().sqrt())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rotating_spreads_an_outlier_channel(name: str) -> None:
    """QuaRot's purpose: one channel of the stream that is 60 times larger in the embedding is no longer seen."""
    source = family_source(name)
    embedding = next(w for w in arch_of(source).writers if "wpe" not in w)
    source.read(embedding)[:, 5] *= 60  # shares memory with the model
    turned = rotate(source, r2=0)
    before, after = outlier_ratio(source.read(embedding)), outlier_ratio(turned.read(embedding))
    assert before > 10 and after < 0.5 * before
    assert check_function(source, turned) < 1e-10


def test_the_seed_decides_the_rotation_and_the_identity() -> None:
    source = family_source("llama")
    one, same, other = rotate(source, seed=1), rotate(source, seed=1), rotate(source, seed=2)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.read(name), same.read(name)) and one.identity() == same.identity()
    assert not torch.equal(one.read(name), other.read(name)) and one.identity() != other.identity()
    assert one.identity() != source.identity() and "rotate(seed=1,r1=1,r2=1,r4=0)" in str(one.identity())


def test_folding_first_changes_nothing_of_rotating() -> None:
    source = family_source("phi")
    direct, after = rotate(source), rotate(fold(source, head=1))
    for name in direct.tensors:
        assert torch.allclose(direct.read(name), after.read(name), rtol=1e-10, atol=1e-12), name


def test_values_of_a_head_against_loops() -> None:
    """R2 with grouped queries: query head h reads value head h // 2, and both see the same R."""
    source = family_source("llama")
    turned = rotate(source, r1=0)
    layer = "model.layers.1.self_attn."
    v, o = source.read(layer + "v_proj.weight"), source.read(layer + "o_proj.weight")
    r = rotation_for(8, 1).matrix()
    for head in range(2):
        rows = slice(8 * head, 8 * head + 8)
        assert torch.allclose(turned.read(layer + "v_proj.weight")[rows], r.mT @ v[rows], rtol=1e-12, atol=1e-14)
    for head in range(4):
        columns = slice(8 * head, 8 * head + 8)
        assert torch.allclose(
            turned.read(layer + "o_proj.weight")[:, columns], o[:, columns] @ r, rtol=1e-12, atol=1e-14
        )


def test_widths_without_a_hadamard_matrix_are_rotated_at_random() -> None:
    import transformers

    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=128, hidden_size=54, intermediate_size=90, num_hidden_layers=1,
        num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=64,
    )  # fmt: skip
    source = random_source(config)
    assert check_function(source, rotate(source, r4=1)) < 1e-10
    assert rotation_for(54, 0).kind == "random"
    config = transformers.GPT2Config(
        architectures=["GPT2LMHeadModel"], vocab_size=128, n_embd=54, n_layer=1, n_head=3, n_positions=64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    source = random_source(config)
    assert check_function(source, rotate(source, r4=1)) < 1e-10
