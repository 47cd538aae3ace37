"""Logits of the engine against those of transformers, for every family, format and instruction set."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import MODELS, apart, build_model, reference, tokens
from transformers import AutoModelForCausalLM

import lowbit
from lowbit import Engine
from lowbit.errors import EngineError, RecipeError, SourceError
from lowbit.families import families
from lowbit.families.family import PRE_NORMS, Decoder
from lowbit.kernels.core import core

# Where inputs are rounded to int8, a difference in the last bit of float32 flips roundings.
EXACT, ROUNDED = 2e-3, 2.5e-2
LENGTHS = (1, 2, 63, 64, 65, 300)
ISAS = () if core() is None else tuple(core().isas())
Folder = Callable[..., Path]

# recipe -> (how far, whether some weights are expanded)
RECIPES: dict[str, tuple[float, bool]] = {
    "int8:channel": (EXACT, False),
    "iq4nl:g32": (EXACT, False),
    "nf4:g64": (EXACT, False),
    "int4:g32:asym": (EXACT, False),
    "int3": (EXACT, False),
    "int5:g32": (EXACT, False),
    "uint4:g32:min=fp16": (EXACT, False),
    "mxfp4": (EXACT, False),
    "nvfp4": (EXACT, False),
    "e4m3:channel": (EXACT, True),
    "kmeans4:channel": (EXACT, True),
    "int4:g8": (EXACT, True),
    "int8:tensor": (EXACT, False),
    "w3": (EXACT, False),
    "int4:g32,embed=keep": (EXACT, False),
    "int4:g32,lm_head=keep": (EXACT, False),
    "int4:g32,*.q_proj=int8:channel,*.up_proj=int5:g32": (EXACT, False),
    "int4:g32,*.v_proj=keep,*.gate_proj=keep": (EXACT, False),
    "int4:g32,a=int8:token": (ROUNDED, False),
    "int8:channel,a=int8:g32": (ROUNDED, False),
}


def loaded(folder: Path) -> Any:
    return lowbit.load(folder, dtype="float32", kernel="expand")


@pytest.mark.parametrize("name", MODELS)
def test_every_family_float_and_packed(name: str, float_folder: Folder, packed_folder: Folder) -> None:
    for model, folder in (
        (build_model(name), float_folder(name)),
        (loaded(packed_folder(name, "int4:g32")), packed_folder(name, "int4:g32")),
    ):
        engine = Engine.open(folder, threads=1)
        for length in LENGTHS:
            ids = tokens(
                length, 2000 + length
            )  # of others, two experts tie but for the last bits, and either may be chosen
            right = reference(model, ids)
            assert apart(engine.logits(ids), right) < EXACT, (name, length)
        assert not engine.describe().expanded and not engine.describe().rounded


def _shares(d: Decoder) -> Decoder:
    assert d.experts is not None
    return replace(d, experts=replace(d.experts, normalized=False))


def _swapped(d: Decoder) -> Decoder:
    assert d.experts is not None
    gate, up, down = d.experts.apart
    return replace(d, experts=replace(d.experts, apart=(up, gate, down)))


WRONG = {
    "shares that are not brought to a sum of 1": ("mixtral", _shares),
    "gates and ups of experts in each other's place": ("qwen3_moe", _swapped),
    "norms before that stand behind": ("olmo2", lambda d: replace(d, norms={**d.norms, **PRE_NORMS})),
    "norms of single heads": ("olmo2", lambda d: replace(d, norms_of_all_heads=False)),
    "embeddings as they are": ("gemma", lambda d: replace(d, values=lambda config: {})),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_fact_is_refused_or_seen_in_the_logits(
    what: str, float_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, change = WRONG[what]
    family, ids = families()[name], tokens(20)
    assert family.decoder is not None
    monkeypatch.setitem(families(), name, replace(family, decoder=change(family.decoder)))
    try:
        found = Engine.open(float_folder(name), threads=1).logits(ids)
    except SourceError as error:
        assert what == "norms of single heads" and "norm" in str(error)
    else:
        assert apart(found, reference(build_model(name), ids)) > 10 * EXACT


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["llama", "llama-odd"])
def test_every_kind_of_weight(name: str, recipe: str, packed_folder: Folder) -> None:
    bound, expands = RECIPES[recipe]
    folder = packed_folder(name, recipe)
    engine, ids = Engine.open(folder, threads=1), tokens(65)
    assert apart(engine.logits(ids), reference(loaded(folder), ids)) < bound
    assert bool(engine.describe().expanded) == expands and not engine.describe().rounded


DIVIDED = [
    "smooth+absmax@int8:channel,a=int8:token",
    "smooth+absmax@int4:g8,a=int8:token:divisor",
    "smooth+absmax@int8:channel,a=int8:token:divisor",
    "int8:channel,a=minmax@int8:tensor",
]


@pytest.mark.parametrize("recipe", DIVIDED)
def test_divided_and_static_inputs(recipe: str, packed_folder: Folder) -> None:
    folder = packed_folder("qwen2", recipe, ("the cat and the hen are in the tree. " * 60,))
    engine, ids = Engine.open(folder, threads=1), tokens(65)
    assert apart(engine.logits(ids), reference(loaded(folder), ids)) < ROUNDED


def test_int8_activations_and_rounded_levels(packed_folder: Folder) -> None:
    ids = tokens(65)
    for recipe in ("int4:g32", "nf4:g64"):
        folder = packed_folder("llama", recipe)
        engine = Engine.open(folder, threads=1, activations="int8")
        assert EXACT < apart(engine.logits(ids), reference(loaded(folder), ids)) < ROUNDED
        assert bool(engine.describe().rounded) == (recipe == "nf4:g64") and not engine.describe().expanded


def test_chunks_change_nothing(packed_folder: Folder) -> None:
    for name in ("llama", "gemma3_text", "phi3-long", "olmo2", "qwen3_moe"):
        engine, ids = Engine.open(packed_folder(name, "int4:g32"), threads=1), tokens(300)
        whole = engine.logits(ids)
        for chunk in (1, 7, 64, 299):
            assert apart(engine.logits(ids, chunk), whole) < 1e-6


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_long_contexts_are_shared_by_threads(name: str, packed_folder: Folder) -> None:
    """Above 512 positions one token's attention is cut into splits that are joined."""
    folder = packed_folder(name, "int4:g32")
    ids = tokens(1000)
    right = reference(loaded(folder), ids)
    for threads in (1, 2):
        engine = Engine.open(folder, threads=threads)
        assert apart(engine.logits(ids), right) < EXACT
        cache = engine.kv_cache(1, 1000)
        engine.forward(cache, [(0, ids[:999], 0)], [])
        last = engine.forward(cache, [(0, ids[999:], 999)], [0])
        assert apart(torch.from_numpy(last), right[-1:]) < EXACT


@pytest.mark.parametrize("cache", ["int16", "int8", "int4:g16:recent=20:sinks=2", "kivi4"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "llama-wide", "qwen3_moe"])
def test_logits_depend_on_the_sequence_alone(name: str, cache: str, packed_folder: Folder) -> None:
    """Bit for bit: not on what runs beside it, nor on how it is cut, nor on the number of threads, at any length."""
    folder, lengths = packed_folder(name, "int4:g32"), (1000, 3, 513, 70, 512, 600)
    prompts, found = [tokens(n, n) for n in lengths], []

    def last(engine: Engine, chosen: list[int], cut: int) -> dict[int, Any]:
        """After each prompt, read in two parts side by side with the others chosen, and one more token."""
        cache = engine.kv_cache(len(chosen), 1001)
        chunks = [(slot, prompts[i][:-cut], 0) for slot, i in enumerate(chosen) if len(prompts[i]) > cut]
        engine.forward(cache, chunks, [])
        rest = [(slot, prompts[i][-cut:], max(len(prompts[i]) - cut, 0)) for slot, i in enumerate(chosen)]
        one = engine.forward(cache, rest, range(len(chosen))).copy()
        more = engine.forward(
            cache, [(slot, [7], len(prompts[i])) for slot, i in enumerate(chosen)], range(len(chosen))
        )
        return {i: (one[slot], more[slot]) for slot, i in enumerate(chosen)}

    for threads in (1, 2, 3):
        engine = Engine.open(folder, threads=threads, cache=cache)
        found.append(last(engine, list(range(len(prompts))), 1))
        found.append(last(engine, [0, 2], 5))
        found += [last(engine, [i], 2) for i in range(len(prompts))]
    for i in range(len(prompts)):
        every = [f[i] for f in found if i in f]
        assert all(np.array_equal(a, b) for e in every for a, b in zip(e, every[0], strict=True)), lengths[i]


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str, packed_folder: Folder) -> None:
    for name, recipe in (
        ("llama-odd", "int4:g32"),
        ("gemma2", "iq4nl:g32"),
        ("qwen3", "int8:channel"),
        ("mixtral", "int4:g32:asym"),
        ("llama", "nf4:g64"),
    ):
        folder = packed_folder(name, recipe)
        right = reference(loaded(folder), tokens(65))
        for cache, bound in (("int16", EXACT), ("int8", ROUNDED)):
            engine = Engine.open(folder, threads=2, isa=isa, cache=cache)
            assert apart(engine.logits(tokens(65)), right) < bound
            assert engine.describe().isa == isa


def test_an_int8_cache_is_smaller_and_near(packed_folder: Folder) -> None:
    folder = packed_folder("mistral", "int4:g32")
    wide, small = (Engine.open(folder, threads=1, cache=c) for c in ("int16", "int8"))
    ids = tokens(300)
    assert apart(small.logits(ids), wide.logits(ids)) < ROUNDED
    assert small.describe().cache_bytes_per_token < 0.6 * wide.describe().cache_bytes_per_token


OLD = {  # what versions of transformers before 5 wrote: fields by other names, and defaults left out
    "llama3": lambda c: {**{k: v for k, v in c.items() if k != "rope_parameters"}, "rope_theta": 10000.0, "rope_scaling": {
        k: v for k, v in c["rope_parameters"].items() if k != "rope_theta"}},
    "qwen2-sliding": lambda c: {**{k: v for k, v in c.items() if k not in ("layer_types", "rope_parameters")}, "rope_theta": 500.0},
    "gemma2": lambda c: {k: v for k, v in c.items() if k not in ("layer_types", "rope_parameters")},
    "gemma3_text": lambda c: {
        **{k: v for k, v in c.items() if k not in ("layer_types", "rope_parameters")}, "sliding_window_pattern": 2,
        "rope_theta": 1e6, "rope_local_base_freq": 500.0},
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_old_configs_mean_what_they_meant(name: str, float_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(float_folder(name), folder)
    config = OLD[name](json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "4.51.0"}))
    model, ids = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokens(65)
    assert apart(Engine.open(folder, threads=1).logits(ids), reference(model, ids)) < EXACT


def test_a_live_model_float_or_packed(packed_folder: Folder) -> None:
    ids = tokens(65)
    for model in (build_model("qwen2"), loaded(packed_folder("qwen2", "int4:g32"))):
        assert apart(Engine.open(model, threads=1).logits(ids), reference(model, ids)) < EXACT
    half = build_model("llama-tied").bfloat16()
    engine = Engine.open(half, threads=1)
    assert apart(engine.logits(ids), reference(half.float(), ids)) < EXACT


def test_untied_heads_stay_their_own(packed_folder: Folder) -> None:
    tied = Engine.open(packed_folder("llama-tied", "int4:g32"), threads=1).describe().packed_bytes
    assert tied < Engine.open(packed_folder("llama", "int4:g32"), threads=1).describe().packed_bytes


REFUSED = {
    "type": ({"model_type": "gpt2"}, "models of type 'gpt2'"),
    "class": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "rope": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
    "heads": ({"head_dim": 8}, "heads of 8 channels"),
    "activation": ({"hidden_act": "relu2"}, "'relu2'"),
    "method": ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why(case: str, float_folder: Folder, tmp_path: Path) -> None:
    change, reason = REFUSED[case]
    shutil.copytree(float_folder("llama"), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(SourceError if case == "method" else EngineError, match=reason):
        Engine.open(tmp_path / "model")


def test_wrong_options_say_what_there_is(packed_folder: Folder) -> None:
    folder = packed_folder("llama", "int4:g32")
    for options, reason in (
        ({"activations": "int4"}, "exact, int8"),
        ({"cache": "fp8"}, "use int8"),
        ({"threads": 0}, "1 or more"),
        ({"isa": "sse"}, "portable"),
    ):
        with pytest.raises(RecipeError, match=reason):
            Engine.open(folder, **options)
    engine = Engine.open(folder, threads=1)
    with pytest.raises(EngineError, match="1024 positions"):
        engine.logits(tokens(1025))
    with pytest.raises(EngineError, match="vocabulary"):
        engine.logits([200])
    with pytest.raises(EngineError, match="one or more"):
        engine.logits([])
