"""Allocation: against brute force, to the byte, and back from its recipe."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import lowbit
from lowbit.budget.choose import allocate, allocation
from lowbit.budget.knapsack import choose
from lowbit.budget.sensitivity import Sensitivity
from lowbit.budget.sizes import parse_size
from lowbit.errors import RecipeError
from lowbit.formats import parse_format
from lowbit.interchange.opening import open_source
from lowbit.interchange.source import Source
from lowbit.planning.plan import make_plan
from lowbit.recipes.layer_globs import with_layers
from lowbit.recipes.recipe import Recipe
from lowbit.recipes.text import to_toml
from tiny import TINY

LADDER = ("int2:g32", "int3:g32", "int4:g16", "int6:g32", "int8:g32")
TWO = (("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"))


def made_up(source: Source, candidates: tuple[str, ...] = LADDER, seed: int = 0) -> Sensitivity:
    """A sensitivity of random numbers that fall with the bits, no tensor like another."""
    rng = np.random.default_rng(seed)
    kl = {}
    for name, param in source.inventory.params.items():
        if param.keep is None:
            weight = rng.lognormal(0, 1.5)
            costs = {f: weight * rng.uniform(0.8, 1.2) * 4.0 ** -parse_format(f).grid.bits for f in candidates}
            extra = {"int8:channel": weight * 1e-5} if param.kind in ("embedding", "head") else {}
            kl[name] = costs | extra
    return Sensitivity(source.label, source.identity(), "made up", {}, candidates, kl, kl)


@pytest.fixture(scope="module")
def llama(tiny_folder: Callable[[str], Path]) -> Source:
    return open_source(tiny_folder("llama"))


# The knapsack


def brute(values: list[list[float]], sizes: list[list[float]], capacity: float) -> float | None:
    costs = [
        sum(v[c] for v, c in zip(values, picks))
        for picks in itertools.product(*(range(len(v)) for v in values))
        if sum(s[c] for s, c in zip(sizes, picks)) <= capacity
    ]
    return min(costs, default=None)


@pytest.mark.parametrize("seed", range(150))
def test_a_choice_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = [int(rng.integers(1, 6)) for _ in range(rng.integers(1, 6))]
    digits = int(rng.integers(1, 4))  # few digits: ties
    values = [rng.random(k).round(digits).tolist() for k in counts]
    sizes = [(rng.integers(1, 40, k) * (1.0 if seed % 2 else 0.37)).tolist() for k in counts]
    capacity = float(rng.integers(1, 40 * len(counts)))
    found, best = choose(values, sizes, capacity), brute(values, sizes, capacity)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert found.value == pytest.approx(best, abs=1e-12) and found.gap == 0
        assert found.value == pytest.approx(sum(v[c] for v, c in zip(values, found.picks)))
        assert found.size == pytest.approx(sum(s[c] for s, c in zip(sizes, found.picks))) and found.size <= capacity


@pytest.mark.parametrize("seed", range(30))
def test_a_choice_with_few_states_says_what_it_may_miss(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [rng.random(5).tolist() for _ in range(6)]
    sizes = [rng.integers(1, 100, 5).astype(float).tolist() for _ in range(6)]
    capacity = 200.0
    found, best = choose(values, sizes, capacity, most_states=2), brute(values, sizes, capacity)
    assert found is not None and best is not None
    assert found.bound <= best + 1e-12 and best <= found.value + 1e-12 and found.size <= capacity


# Allocation


def test_bytes_are_the_best_of_all_recipes(llama: Source) -> None:
    """Every allocation of four groups is planned in full; none within the size has less predicted KL."""
    sensitivity = made_up(llama)
    groups = [
        [f"model.layers.{layer}.{room}.{word}.weight" for word in words]
        for layer in (0, 1)
        for room, words in (("self_attn", TWO[0]), ("mlp", TWO[1]))
    ]
    every = []
    for picks in itertools.product(LADDER, repeat=len(groups)):
        layers = tuple((n, parse_format(f)) for names, f in zip(groups, picks) for n in names)
        size = make_plan(llama, replace(Recipe.of("search@int4:g32"), layers=layers)).output_bytes
        every.append((size, sum(sensitivity.kl[n][f] for names, f in zip(groups, picks) for n in names)))
    sizes = sorted({size for size, _ in every})
    for target in (sizes[len(sizes) // 4], sizes[len(sizes) // 2], sizes[-1]):
        made = allocation(llama, sensitivity, target_size=target, share=TWO)
        best = min(kl for size, kl in every if size <= target)
        assert sum(r.kl or 0 for r in made.rows if not r.fixed) == pytest.approx(best, rel=1e-9)
        assert made.plan.output_bytes <= target and made.gap == 0
    for limit in (0.05, 0.3, 1.0):
        fixed = sum(sensitivity.kl[n]["int8:channel"] for n in ("model.embed_tokens.weight", "lm_head.weight"))
        small = allocation(llama, sensitivity, target_kl=limit + fixed, share=TWO)
        # The header is not weighed for a KL target; it differs by the digits of its numbers.
        assert small.plan.output_bytes <= min(size for size, kl in every if kl <= limit) + 16
        assert small.predicted_kl <= limit + fixed


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "t5", "gemma3"])
@pytest.mark.parametrize("seed", [0, 1])
def test_sizes_are_met_and_uniform_is_never_better(arch: str, seed: int, tiny_folder: Callable[[str], Path]) -> None:
    source = open_source(tiny_folder(arch))
    sensitivity = made_up(source, seed=seed)
    for uniform in LADDER:
        plan = make_plan(source, Recipe.of(f"search@{uniform}"))
        made = allocation(source, sensitivity, target_size=plan.output_bytes)
        assert made.plan.output_bytes <= plan.output_bytes
        same = sum(sensitivity.kl[r.name][uniform] for r in made.rows if not r.fixed)
        assert sum(r.kl or 0 for r in made.rows if not r.fixed) <= same * (1 + 1e-12)
        bits = plan.linear_bits_per_weight
        assert allocation(source, sensitivity, target_bits=bits).plan.linear_bits_per_weight <= bits


def test_with_some_layers_a_target_is_met_within_a_hundredth() -> None:
    config = TINY["llama"]()
    config.num_hidden_layers = 12
    source = open_source(transformers.LlamaForCausalLM(config).eval())
    sensitivity = made_up(source)
    smallest = make_plan(source, Recipe.of("search@int2:g32")).output_bytes
    largest = make_plan(source, Recipe.of("search@int8:g32")).output_bytes
    for target in np.linspace(smallest * 1.02, largest, 9).astype(int).tolist():
        for embeddings in (False, True):
            made = allocation(source, sensitivity, target_size=target, embeddings=embeddings)
            assert 0.99 * target <= made.plan.output_bytes <= target
    for bits in (2.6, 3.0, 4.5, 5.25, 8.0):
        made = allocation(source, sensitivity, target_bits=bits)
        assert 0.99 * bits <= made.plan.linear_bits_per_weight <= bits


def test_the_size_is_that_of_the_written_files(
    llama: Source, tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    sensitivity = made_up(llama)
    target = make_plan(llama, Recipe.of("search@int4:g16")).output_bytes + 100
    recipe = allocate(llama, sensitivity, target_size=target, embeddings=True)
    lowbit.quantize(tiny_folder("llama"), recipe, tmp_path / "out")
    written = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors*"))
    assert 0.99 * target <= written <= target


@pytest.mark.parametrize("arch", ["llama", "mixtral", "t5", "gpt2"])
def test_a_recipe_comes_back_from_text_and_toml(
    arch: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:  # fmt: skip
    source = open_source(tiny_folder(arch))
    middle = make_plan(source, Recipe.of("search@int4:g16")).output_bytes
    made = allocation(source, made_up(source), target_size=middle, embeddings=True)
    (tmp_path / "recipe.toml").write_text(to_toml(made.recipe))
    for back in (Recipe.parse(str(made.recipe)), Recipe.parse(str(tmp_path / "recipe.toml"))):
        assert back == made.recipe
        assert [t.format for t in make_plan(source, back).tensors] == [t.format for t in made.plan.tensors]


def test_layers_of_one_input_share_a_format(llama: Source) -> None:
    made = allocation(llama, made_up(llama, seed=3), target_bits=4.4)
    formats = {r.name: r.format for r in made.rows}
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        assert len({formats[f"{attention}{x}_proj.weight"] for x in "qkv"}) == 1
        assert formats[mlp + "gate_proj.weight"] == formats[mlp + "up_proj.weight"]
    apart = allocation(llama, made_up(llama, seed=3), target_bits=4.4, share=())
    assert len({r.format for r in apart.rows if r.name.startswith("model.layers.0.self_attn")}) > 1
    assert apart.predicted_kl <= made.predicted_kl


def test_what_the_recipe_fixes_stays_and_is_counted(llama: Source) -> None:
    base = "search@int4:g32,embed=int6:g32,*.1.mlp.down_proj=int8:channel,*.0.mlp.down_proj=keep"
    made = allocation(llama, made_up(llama), base, target_bits=8.0)
    formats = {r.name: str(r.format) for r in made.rows}
    assert formats["model.layers.1.mlp.down_proj.weight"] == "int8:channel"
    assert formats["model.layers.0.mlp.down_proj.weight"] == "None"
    assert formats["model.embed_tokens.weight"] == "int6:g32"
    assert [r.name for r in made.rows if r.fixed and "layers" in r.name and r.bits == 32]
    assert 0.97 * 8.0 <= made.plan.linear_bits_per_weight <= 8.0


def test_memory_counts_weights_cache_and_the_rest(llama: Source) -> None:
    sensitivity = made_up(llama)
    room = make_plan(llama, Recipe.of("search@int4:g16")).output_bytes
    # Two layers, two key-value heads of eight numbers, keys and values, two bytes a number.
    cache = 2 * 2 * 8 * 2 * 2 * 1000
    made = allocation(
        llama, sensitivity, fit_memory=room + 3 * cache + 5000, context=1000, sequences=3, overhead=5000
    )  # fmt: skip
    assert made.room == room and 0.99 * room <= made.plan.output_bytes <= room
    most = allocation(llama, sensitivity, fit_memory="1GB")
    assert {str(r.format) for r in most.rows if not r.fixed} == {"int8:g32"}
    with pytest.raises(RecipeError, match=r"600,0.* of which .* are not for weights"):
        allocation(llama, sensitivity, fit_memory="600MB")


def test_an_impossible_target_names_the_nearest(llama: Source) -> None:
    sensitivity = made_up(llama)
    smallest = make_plan(llama, Recipe.of("search@int2:g32")).output_bytes
    with pytest.raises(RecipeError, match=f"too little: the smallest .* is {smallest:,} bytes"):
        allocation(llama, sensitivity, target_size=smallest - 1)
    assert allocation(llama, sensitivity, target_size=smallest).plan.output_bytes == smallest
    largest = make_plan(llama, Recipe.of("search@int8:g32")).output_bytes
    with pytest.raises(RecipeError, match=f"10,000,000 bytes is more .* reach, {largest:,} bytes at most"):
        allocation(llama, sensitivity, target_size="10MB")
    with pytest.raises(RecipeError, match=r"2 bits are too few: these formats reach 2\.5"):
        allocation(llama, sensitivity, target_bits=2)
    with pytest.raises(RecipeError, match="9 bits .* 8.5000 at most"):
        allocation(llama, sensitivity, target_bits=9)
    with pytest.raises(RecipeError, match="cannot be reached: with these formats the least is"):
        allocation(llama, sensitivity, target_kl=1e-9)


def test_what_makes_no_sense_is_an_error(llama: Source, tiny_folder: Callable[[str], Path]) -> None:
    sensitivity = made_up(llama)
    for targets in ({}, {"target_size": 10**5, "target_bits": 4.0}):
        with pytest.raises(RecipeError, match="one target is needed"):
            allocation(llama, sensitivity, **targets)
    for bad in (0, -1, float("nan"), True, "4"):
        with pytest.raises(RecipeError, match="target_bits is a number above 0"):
            allocation(llama, sensitivity, target_bits=bad)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="counts linear layers only"):
        allocation(llama, sensitivity, target_bits=4, embeddings=True)
    with pytest.raises(RecipeError, match="measured on another model"):
        allocation(open_source(tiny_folder("gpt2")), sensitivity, target_bits=4)
    with pytest.raises(RecipeError, match="no layer .* is left to allocate"):
        allocation(llama, sensitivity, "int4:g32,*=int8:channel", target_bits=8)
    lacking = replace(sensitivity, kl={k: v for k, v in sensitivity.kl.items() if "layers.1" not in k})
    with pytest.raises(RecipeError, match=r"lacks 'model\.layers\.1"):
        allocation(llama, lacking, target_bits=4)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80MB", 80 * 10**6), ("8GiB", 8 << 30), ("1.5 gb", 1_500_000_000), ("500k", 500_000), ("123", 123), (123, 123),
     ("2 KiB", 2048), ("7B", 7)],
)  # fmt: skip
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "8 GBs", "1e9", "0", "8iB", "1,000", "nan"])
def test_other_sizes_are_errors(text: str) -> None:
    with pytest.raises(RecipeError, match="is no size"):
        parse_size(text)


# What was found


def test_sensitive_layers_are_found_and_not_assumed(llama: Source) -> None:
    sensitivity = made_up(llama, ("int2:g32", "int3:g32", "int4:g32", "int5:g32", "int6:g32"))
    for special in ("q_proj", "down_proj"):
        kl = {
            n: {f: (50.0 if special in n else 1.0) * 4.0 ** -parse_format(f).grid.bits for f in by}
            for n, by in sensitivity.kl.items()
        }
        made = allocation(llama, replace(sensitivity, kl=kl), target_bits=4.0, share=())
        assert next(iter(made.by_role())) == f"model.layers.*.{'self_attn' if special[0] == 'q' else 'mlp'}.{special}"
        assert special in made.found_sensitive()[0]


# Globs


@pytest.mark.parametrize("seed", range(20))
def test_globs_say_what_was_chosen(seed: int) -> None:
    """Random formats for names of 32 blocks, experts in lists and odd names: each gets its own back."""
    rng = np.random.default_rng(seed)
    names = [
        f"model.layers.{i}.{w}.weight" for i in range(32) for w in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up")
    ]
    names += [f"m.{i}.experts.{j}.w1.weight" for i in (0, 9, 10) for j in range(12)] + [
        "lm_head.weight",
        "h.1",
        "x.weight",
    ]
    kinds = dict.fromkeys(names, "linear") | {"lm_head.weight": "head"}
    options = [None, *map(parse_format, LADDER)]
    chosen = {
        n: options[int(i)] for n, i in zip(names, rng.choice(6, len(names), p=[0.02, 0.06, 0.06, 0.7, 0.1, 0.06]))
    }
    del chosen["x.weight"], chosen["lm_head.weight"]
    base = Recipe.of("search@int4:g32,embed=int6:g32,*.31.*=int8:channel")
    made = with_layers(base, chosen, kinds, parse_format("int4:g16"))
    for name in names:
        fixed = base.format_for(name, kinds[name])
        own = fixed if ".31." in name else chosen.get(name, fixed)
        assert made.format_for(name, kinds[name]) == own, name
    assert len(made.layers) < 75


def test_like_layers_take_one_glob() -> None:
    names = [f"model.layers.{i}.{w}_proj.weight" for i in range(40) for w in ("attn.q", "attn.k", "mlp.down")]
    chosen = {n: parse_format("int6:g32" if "down" in n else "int4:g32") for n in names}
    chosen |= {
        n: parse_format("int8:g32") for n in names if n.split(".")[2] in ("0", "1", "2", "5", "39") and "attn" in n
    }
    made = with_layers(Recipe.of("int3:g32"), chosen, dict.fromkeys(names, "linear"), parse_format("int4:g32"))
    assert [(p, str(f)) for p, f in made.layers] == [
        ("model.layers.*.mlp.down_proj", "int6:g32"),
        ("model.layers.[0-25].attn.[qk]_proj", "int8:g32"),
        ("model.layers.39.attn.[qk]_proj", "int8:g32"),
    ]


def test_an_allocated_model_runs(llama: Source, tiny_folder: Callable[[str], Path]) -> None:
    recipe = allocate(llama, made_up(llama), target_bits=5)
    model = lowbit.quantize(tiny_folder("llama"), recipe).model
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
