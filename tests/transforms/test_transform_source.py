"""Transforms by name and order, and a transformed source as just another source of the pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from variants import family_source, random_source

from lowbit.errors import RecipeError, SourceError
from lowbit.interchange.opening import open_source
from lowbit.pipeline.driver import write_folder
from lowbit.pipeline.loading import load
from lowbit.planning.plan import make_plan
from lowbit.recipes.recipe import Recipe
from lowbit.solvers import Call
from lowbit.solvers.registry import methods
from lowbit.transforms import FACTS, check_order, fold, rotate
from lowbit.transforms.check import logits
from tiny import TINY, save_tiny


def test_transforms_are_methods_with_options() -> None:
    assert set(FACTS) == set(methods("transform")) == {"fold", "rotate", "smooth", "awq"}
    assert Call("rotate", (("seed", 3),)).method.options == {"seed": 0, "r1": 1, "r2": 1, "r4": 0}
    assert all(m.summary for m in methods("transform").values())
    with pytest.raises(RecipeError, match="no option 'sed'; did you mean 'seed'"):
        Call("rotate", (("sed", 3),))
    assert {name: facts.kind for name, facts in FACTS.items()} == {
        "fold": "source", "rotate": "source", "smooth": "group", "awq": "group",
    }  # fmt: skip


@pytest.mark.parametrize("names", [[], ["awq"], ["fold", "awq"], ["rotate", "awq"], ["fold", "rotate", "smooth"]])
def test_orders_that_work(names: list[str]) -> None:
    check_order(names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["smooth", "fold"], r"'fold' after 'smooth' .*write fold\+smooth"),
        (["awq", "rotate"], r"'rotate' after 'awq' .*write rotate\+awq"),
        (["rotate", "fold"], r"'fold' after 'rotate' .*write fold\+rotate"),
        (["fold", "smooth", "rotate"], r"write fold\+rotate\+smooth"),
        (["smooth", "awq"], r"'awq' beside 'smooth'.*keep one"),
        (["fold", "fold"], "given twice"),
        (["awk"], "no transform; did you mean 'awq'"),
    ],
)
def test_orders_that_undo_are_errors_that_name_the_right_one(names: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_order(names)


def test_scaling_before_folding_really_is_undone() -> None:
    """What `undone_by` claims: a scale that went into a norm is gone after folding."""
    from test_scale import Replaced, random_scale

    from lowbit.transforms.arch import arch_of
    from lowbit.transforms.scale import apply_scale

    source = family_source("llama")
    arch = arch_of(source)
    norm = arch.norms[0]
    tensors = {n: source.read(n) for n in (*norm.producers, *norm.consumers)}
    scaled = Replaced(source, apply_scale(arch, norm, tensors, random_scale(32, 0))[0])
    reader = norm.readers[0]
    assert not torch.allclose(scaled.read(reader), source.read(reader))
    assert torch.allclose(fold(scaled).read(reader), fold(source).read(reader), rtol=1e-12)


def test_values_are_rounded_once_however_many_transforms_there_are() -> None:
    source = random_source(TINY["llama"](), dtype=torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj.weight"
    turned = rotate(fold(source), seed=1)
    exact = turned.exact(name)
    assert exact.dtype == torch.float64 and turned.read(name).dtype == torch.bfloat16
    assert torch.equal(turned.read(name), exact.to(torch.bfloat16))
    twice = turned.read(name).double() - exact
    assert 0 < float(twice.norm() / exact.norm()) < 2**-9


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_a_pipeline_sees_just_another_source(name: str, tmp_path: Path) -> None:
    """Plan, write, reload: the untied head is on disk and the logits are those of the untouched model."""
    model = save_tiny(name, tmp_path / "float")
    source = open_source(tmp_path / "float")
    turned = rotate(source)
    plan = make_plan(turned, Recipe.parse("int8:channel,*=keep,lm_head=int8:channel"))
    report = write_folder(plan, turned, tmp_path / "out")
    assert "lm_head.weight" in {layer.name for layer in report.layers if layer.format}
    loaded = load(tmp_path / "out")
    ids = torch.arange(20)[None] % 128
    with torch.no_grad():
        before, after = model(ids).logits, loaded(ids).logits
    assert float((before - after).norm() / before.norm()) < 0.05  # int8 in the head only
    again = write_folder(plan, rotate(open_source(tmp_path / "float")), tmp_path / "again")
    assert again == report
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


def test_a_folder_source_keeps_its_function_in_float32(tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path / "float")
    source = open_source(tmp_path / "float")
    turned = rotate(source)
    one, two = (logits(s, tokens=16, seed=0) for s in (source, turned))
    assert 0 < float((one - two).norm() / one.norm()) < 1e-5  # rounded to float32 on reading
    assert turned.tokenizer() is not None and turned.disk_bytes() == source.disk_bytes()
    turned.save_assets(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert source.identity() == turned.inner.inner.identity()  # type: ignore[attr-defined]


def test_an_unknown_tensor_is_an_error_as_in_every_source() -> None:
    with pytest.raises(SourceError, match="no tensor 'lm_haed.weight'"):
        rotate(family_source("llama")).read("lm_haed.weight")
