"""Inputs that differ from layer to layer: by globs of the recipe, and where a static range explodes."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.blockwise.range_survey import BOUNDLESS, Spread
from lowbit.errors import LowbitError, RecipeError
from lowbit.formats import parse_inputs
from lowbit.nn.swap import packed_weights
from lowbit.pipeline import api, driver
from lowbit.recipes.activation_rules import FALLBACK, Fallback, InputRule, inputs_text
from lowbit.recipes.layer_globs import globs_of
from lowbit.recipes.recipe import Recipe
from lowbit.recipes.text import to_toml
from lowbit.solvers.ranges.estimator import RangeMethod
from tiny import VOCAB, save_tiny, tiny_model

STATIC = "absmax@int8:channel,a=minmax@int8:tensor"
DOWN, UP = "model.layers.{}.mlp.down_proj.weight", "model.layers.{}.mlp.up_proj.weight"


def token_ids(count: int = 6, length: int = 24, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for _ in range(count)]


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        found: Tensor = model(input_ids=ids, **extra).logits
    return found


def inputs_of(model: nn.Module, names: list[str], ids: list[Tensor]) -> dict[str, Tensor]:
    """[tokens, K] of what linear layers read, by ordinary hooks."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(n.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, args, n=n: seen[n].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for n in names
    ]
    for window in ids:
        logits(model, window[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize(
    "text",
    [
        "search@int8:channel,a=int8:tensor:static,a:*.down_proj=int8:g64,a:*.layers.0.*=float",
        "search@int8:channel,a:*.down_proj=percentile(p=99.9)@int8:tensor:static",
        "search@int8:channel,a=int8:tensor:static,fallback=never",
        "search@int8:channel,a=mse@int8:tensor:static,fallback=int8:token:outliers=6:over=48",
        "search@int8:channel,a=int8:tensor:static,fallback=float:over=100,*.down_proj=keep",
    ],
)
def test_the_text_and_toml_forms_come_back(text: str, tmp_path: Path) -> None:
    recipe = Recipe.parse(text)
    assert Recipe.parse(str(recipe)) == recipe and sorted(str(recipe).split(",")) == sorted(text.split(","))
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe))
    assert Recipe.parse(str(path)) == recipe
    assert ("[inputs]" in to_toml(recipe)) == bool(recipe.layer_inputs)


def test_the_last_glob_wins_and_the_python_form_is_the_same() -> None:
    token, tensor = parse_inputs("int8:token"), parse_inputs("int8:tensor:static")
    rules = (("*.mlp.*", InputRule(token)), (DOWN.format(1), InputRule(None)))
    recipe = dataclasses.replace(Recipe.parse("search@int8:channel"), inputs=tensor, layer_inputs=rules)
    assert recipe == Recipe.parse(
        f"search@int8:channel,a=minmax@int8:tensor,a:*.mlp.*=int8:token,a:{DOWN.format(1)}=float"
    )
    found = {n: recipe.rule_for(n) for n in (DOWN.format(0), DOWN.format(1), "model.layers.0.self_attn.q_proj.weight")}
    assert list(found.values()) == [InputRule(token), InputRule(None), InputRule(tensor, RangeMethod())]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("a:=int8:token", "names no layers"),
        ("a:*.down_proj=percentile(p=high)@int8:tensor", "are numbers"),
        ("a:*.down_proj=int8:tokn", "int8:tokn"),
        ("a:*.down_proj=minmax@float", "no range"),
        ("a=int8:token,fallback=int8:g64:over=9", "for static inputs"),
        ("fallback=never", "for static inputs"),
        ("a=minmax@int8:tensor,fallback=int8:tensor:static", "has a stored scale itself"),
        ("a=minmax@int8:tensor,fallback=int8:g64:over=much", "no number"),
        ("a=minmax@int8:tensor,fallback=int8:g64:over=0.5", "no ratio"),
        ("a=minmax@int8:tensor,fallback:*.x=int8:g64", "names no layers"),
    ],
)
def test_settings_that_mean_nothing(settings: str, message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        Recipe.parse(f"search@int8:channel,{settings}")


def test_the_plan_gives_each_layer_its_inputs() -> None:
    recipe = "absmax@int8:channel,a=int8:token,a:*.down_proj=minmax@int8:tensor,a:*.layers.0.self_attn.*=float"
    plan = lowbit.plan(tiny_model("llama-tied"), recipe)
    found = {t.name: str(t.inputs) for t in plan.tensors if t.kind == "linear"}
    for name, inputs in found.items():
        first = "None" if ".0.self_attn." in name else "int8:token"
        assert inputs == ("int8:tensor:static" if "down_proj" in name else first), name
    assert plan.input_counts() == {"int8:token": 8, "int8:tensor:static": 2}
    assert plan.recipe.needs_calibration == "a=int8:tensor:static"
    with pytest.raises(RecipeError, match="a:\\*.nothing=int8:token matches no tensor"):
        lowbit.plan(tiny_model("llama-tied"), "absmax@int8:channel,a:*.nothing=int8:token")
    with pytest.raises(RecipeError, match="has no quantized linear layer"):
        lowbit.plan(tiny_model("llama-tied"), "absmax@int8:channel,a:*embed_tokens=int8:token")


@pytest.mark.parametrize("transform", ["", "smooth+"])
def test_layers_that_share_an_input_may_store_it_differently(transform: str, tmp_path: Path) -> None:
    """The first of the group is dynamic, the second static: its range is that of the input all the same."""
    save_tiny("llama-tied", tmp_path / "float")
    recipe = transform + "absmax@int8:channel,a=int8:token,a:*.k_proj=minmax@int8:tensor,a:*.v_proj=float"
    made = lowbit.quantize(tmp_path / "float", recipe, tmp_path / "out", calibration=token_ids())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    weights = dict(packed_weights(model))
    for i in range(2):
        q, k, v = (f"model.layers.{i}.self_attn.{x}_proj.weight" for x in "qkv")
        assert (str(weights[q].inputs), str(weights[k].inputs)) == ("int8:token", "int8:tensor:static")
        assert weights[v].inputs is None
        x = inputs_of(model, [k], token_ids())[k]
        assert float(weights[k].input_scale) * 127 == pytest.approx(float(x.abs().max()), rel=0.02)
    assert made.plan.output_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    in_memory = lowbit.quantize(tiny_model("llama-tied"), recipe, calibration=token_ids())
    assert torch.equal(logits(in_memory.model, token_ids()[0][None]), logits(model, token_ids()[0][None]))


def ratios(model: nn.Module, ids: list[Tensor]) -> dict[str, float]:
    """Largest |x| to the root mean square of the median token, in float64 and all at once."""
    names = [n for n, p in model.named_parameters() if p.dim() == 2 and "_proj" in n]
    found = {}
    for name, x in inputs_of(model, names, ids).items():
        tokens = x.double().square().mean(1).sqrt().sort().values
        found[name] = float(x.abs().max() / tokens[(len(tokens) - 1) // 2])
    return found


def between(found: dict[str, float]) -> float:
    """A limit in the widest gap of the ratios, so that rounding cannot move one across it."""
    values = sorted(set(found.values()))
    gaps = {b / a: (a * b) ** 0.5 for a, b in pairwise(values[1:])}
    return float(f"{gaps[max(gaps)]:.3g}")


def test_layers_whose_range_explodes_fall_back_and_no_others(tmp_path: Path) -> None:
    save_tiny("llama-tied", tmp_path / "float")
    expected = ratios(tiny_model("llama-tied").eval(), token_ids())
    over = between(expected)
    made = lowbit.quantize(
        tmp_path / "float", f"{STATIC},fallback=int8:g16:over={over}", tmp_path / "out", calibration=token_ids()
    )
    survey = made.plan.survey
    assert survey is not None and survey.ratios.keys() == expected.keys()
    assert all(survey.ratios[n] == pytest.approx(r, rel=0.03) for n, r in expected.items())  # bfloat16 products
    exploded = {n for n, r in expected.items() if r > over}
    assert 0 < len(exploded) < len(expected) and set(survey.exploded) == exploded
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stored = {n: str(w.inputs) for n, w in packed_weights(model) if w.inputs is not None}
    assert stored == {n: "int8:g16" if n in exploded else "int8:tensor:static" for n in expected}
    assert made.plan.output_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    manifest = json.loads((tmp_path / "out" / "lowbit.json").read_text())
    assert manifest["ranges"] == {
        "over": over, "static": len(expected) - len(exploded), "exploded": dict(sorted(survey.exploded.items())),
    }  # fmt: skip
    notes = {layer.name for layer in made.report.layers if "found while running" in layer.note}
    assert notes == exploded
    again = lowbit.quantize(tmp_path / "float", made.plan.recipe, tmp_path / "again", calibration=token_ids())
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("out", "again")]
    assert files[0] == files[1] and again.plan.survey is None, "the recipe of the result says it all"


@pytest.mark.parametrize("name", ["gpt2", "t5", "mixtral", "bert"])
def test_every_architecture_is_looked_at(name: str) -> None:
    model = tiny_model(name).eval()
    plan = lowbit.quantize(model, STATIC, calibration=token_ids()).plan
    static = [t.name for t in plan.tensors if t.inputs is not None]
    assert plan.survey is not None and static and set(plan.survey.ratios) == set(static)
    for weight, x in inputs_of(model, static, token_ids()).items():
        tokens = x.double().square().mean(1).sqrt().sort().values
        expected = float(x.abs().max() / tokens[(len(tokens) - 1) // 2])
        assert plan.survey.ratios[weight] == pytest.approx(expected, rel=0.05), weight


def test_scaling_is_seen_through_and_own_globs_are_left_alone() -> None:
    """Where smoothing moves the outliers away, nothing explodes; a layer that the user made static stays so."""
    model = tiny_model("llama-tied")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] *= 40.0  # type: ignore[union-attr]
    name = "model.layers.0.self_attn.q_proj.weight"
    over = 10.0
    plain = ratios(model.eval(), token_ids())[name]
    recipe = f"absmax@int8:channel,a=minmax@int8:tensor,fallback=int8:token:over={over}"
    rough = lowbit.quantize(model, recipe, calibration=token_ids()).plan
    smooth = lowbit.quantize(model, f"smooth(alpha=0.9)+{recipe}", calibration=token_ids()).plan
    assert rough.survey and smooth.survey
    assert rough.survey.ratios[name] == pytest.approx(plain, rel=0.03)
    assert smooth.survey.ratios[name] < 0.7 * plain
    own = lowbit.quantize(model, f"{recipe},a:*.q_proj=minmax@int8:tensor", calibration=token_ids()).plan
    assert own.survey and name not in own.survey.ratios
    assert next(str(t.inputs) for t in own.tensors if t.name == name) == "int8:tensor:static"


def test_never_looks_at_no_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "survey", lambda *args: pytest.fail("the text was looked at"))
    for recipe in (f"{STATIC},fallback=never", "absmax@int8:channel,a:*.down_proj=minmax@int8:tensor"):
        assert lowbit.quantize(tiny_model("llama-tied"), recipe, calibration=token_ids()).plan.survey is None


def test_a_killed_run_goes_on_with_the_layers_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision is in the journal, so that no second look can come to another one."""
    save_tiny("llama-tied", tmp_path / "float")
    over = between(ratios(tiny_model("llama-tied").eval(), token_ids()))
    recipe = f"smooth+search@int8:channel,a=minmax@int8:tensor,fallback=int8:g16:over={over}"

    def run(out: str) -> None:
        lowbit.quantize(tmp_path / "float", recipe, tmp_path / out, calibration=token_ids())

    run("whole")
    looks: list[int] = []
    original, survey = driver.FolderWriter.write, api.survey
    monkeypatch.setattr(api, "survey", lambda *args: looks.append(1) or survey(*args))

    def write(self: Any, name: str, stored: Any, **facts: Any) -> None:
        if "layers.1." in name:
            raise KeyboardInterrupt
        original(self, name, stored, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(driver.FolderWriter, "write", write)
        with pytest.raises(KeyboardInterrupt):
            run("killed")
    run("killed")
    assert looks == [1]
    for file in ("model.safetensors", "config.json", "lowbit.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_the_ratio_is_of_the_largest_value_to_the_median_token() -> None:
    spread = Spread()
    spread.add(torch.tensor([[[3.0, -4.0], [6.0, 8.0]]]))
    spread.add(torch.tensor([[0.0, -500.0]]))
    assert spread.ratio() == pytest.approx(500 / 50**0.5)
    assert Spread().ratio() == 0.0
    zeros = Spread()
    zeros.add(torch.tensor([[0.0, 0.0], [0.0, 0.0], [7.0, 0.0]]))
    assert zeros.ratio() == BOUNDLESS


def test_globs_match_what_they_are_made_for() -> None:
    known = [f"model.layers.{i}.mlp.{x}_proj.weight" for i in range(23) for x in ("up", "down")]
    for chosen in ([known[1]], known[1::2], known[:9], known[7:30], [known[-1], known[0]]):
        found = globs_of(chosen, known)
        assert [n for n in known if any(Recipe.matches(g, n) for g in found)] == sorted(chosen, key=known.index)
    assert globs_of(known[1::2], known) == ("model.layers.*.mlp.down_proj",)


def test_it_is_said_how_many_layers_stay_static() -> None:
    ranges = {"over": 32.0, "static": 180, "exploded": {"a.weight": 40.0, "b.weight": 1331.0}}
    text = inputs_text({"int8:tensor:static": 180, "int8:g64": 2}, ranges)
    assert "180 layers int8:tensor:static, 2 layers int8:g64" in text and "2 of 182" in text
    assert "the most, 1331 times, in b)" in text and Fallback(FALLBACK.inputs) == FALLBACK
    assert inputs_text({"int8:token": 1}, None) == "1 layer int8:token"
