"""The calibrated driver: what it sees, what it writes, how it resumes, on tiny models of many architectures."""

from __future__ import annotations

import filecmp
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.blockwise.groups import Group
from lowbit.blockwise.places import BlockPlace, blocks_of
from lowbit.blockwise.quantizing import BlockwiseQuantizer
from lowbit.blockwise.walk import BlockWalk, micro_batches
from lowbit.calibration.data import load_calibration
from lowbit.errors import LowbitError, RecipeError
from lowbit.interchange.opening import open_source
from lowbit.nn.swap import packed_weights
from lowbit.pipeline import driver
from lowbit.planning.plan import make_plan
from lowbit.recipes.recipe import Recipe
from lowbit.solvers.stats import Stats
from tiers import mostly_nightly
from tiny import TINY, VOCAB, save_tiny, tiny_model

RECIPE = "gptq@int4:g16"
EXACT = torch.float32  # products


def token_ids(count: int = 12, length: int = 24, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for _ in range(count)]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}  # type: ignore[union-attr]
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, **extra).logits
    return out


def distance(a: nn.Module, b: nn.Module, ids: Tensor) -> float:
    x, y = logits(a, ids), logits(b, ids)
    return float((x - y).norm() / x.norm())


@pytest.mark.parametrize("name", sorted(set(TINY) - {"mamba"}))
def test_every_multiplied_weight_of_every_architecture_is_seen(name: str) -> None:
    model = tiny_model(name)
    made = lowbit.quantize(model, RECIPE, calibration=token_ids(), length=24)
    for layer in made.report.layers:
        kind = made.source.inventory.params[layer.name].kind
        if layer.format is not None and kind in ("linear", "conv1d", "experts"):
            assert layer.output is not None and layer.output.tokens > 0, (layer.name, layer.note)
            assert layer.output.final <= layer.output.nearest * 1.0001
    total = [(x.output.nearest, x.output.final) for x in made.report.layers if x.output]
    assert sum(f for _, f in total) < 0.9 * sum(n for n, _ in total)
    assert distance(model, made.model, token_ids(1, seed=9)[0][None]) < 0.25


def hooked_inputs(model: nn.Module, names: list[str], ids: list[Tensor]) -> dict[str, Tensor]:
    """The inputs of linear layers by ordinary forward hooks, all windows together."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(n.removesuffix(".weight")).register_forward_pre_hook(
            lambda m, args, n=n: seen[n].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for n in names
    ]
    for window in ids:
        logits(model, window[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("name", ["llama-tied", "t5", "bert", "gemma2"])
def test_statistics_are_those_of_the_whole_model_with_what_is_quantized_so_far(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step the stream's input must be that of the ordinary model in which exactly the weights that were solved
    before have their quantized values."""
    model = tiny_model(name)
    source = open_source(model)
    ids = token_ids(4)
    plan = make_plan(source, Recipe.parse(RECIPE + ",embed=keep"))
    shadow = tiny_model(name)
    checked: list[str] = []

    def watch(plans: Any, weights: Any, recipe: Any, stats: Any) -> Any:
        names = [p.name for p in plans]
        assert isinstance(stats, Stats)
        x = hooked_inputs(shadow, names, ids)
        for weight_name in names:
            moment = x[weight_name].T @ x[weight_name] / len(x[weight_name])
            assert float((stats.second_moment - moment).norm() / moment.norm()) < 1e-4, weight_name
        checked.extend(names)
        found = original(plans, weights, recipe, stats)
        for solved in found:
            shadow.get_parameter(solved.plan.name).data.copy_(solved.qtensor().dequantize())
        return found

    from lowbit.blockwise import quantizing as calibrated

    original = calibrated.solve_group
    monkeypatch.setattr(calibrated, "solve_group", watch)
    calibration = load_calibration(ids, None, source, samples=4)
    list(BlockwiseQuantizer(plan, source, calibration, tmp_path, EXACT).results())
    assert len(checked) == sum(
        t.format is not None and t.kind == "linear" for t in plan.tensors if "lm_head" not in t.name
    )


def test_weights_that_read_one_input_share_their_statistics() -> None:
    model = tiny_model("llama")
    calls: list[list[str]] = []
    run = BlockwiseQuantizer._statistics

    def spy(self: BlockwiseQuantizer, *args: Any) -> Iterator[tuple[Group, Any]]:
        for group, stats in run(self, *args):
            calls.append([n.split(".")[-2] for n in group.members])
            yield group, stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockwiseQuantizer, "_statistics", spy)
        lowbit.quantize(model, RECIPE, calibration=token_ids(2))
    assert calls == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2


def test_experts_have_their_own_statistics_and_lean_on_the_others_when_they_saw_little() -> None:
    few = lowbit.quantize(tiny_model("mixtral"), RECIPE, calibration=token_ids(1, 8))
    notes = {x.note for x in few.report.layers if "experts" in x.name}
    assert any("experts saw fewer than" in note for note in notes)
    many = lowbit.quantize(tiny_model("mixtral"), RECIPE, calibration=token_ids(40))
    assert not any(x.note for x in many.report.layers if "experts.gate_up" in x.name)


def test_where_nothing_repeats_the_model_is_one_block() -> None:
    assert blocks_of(nn.Sequential(nn.Linear(4, 4))) == [BlockPlace("", 0, "")]
    chains = [s.chain for s in blocks_of(tiny_model("t5"))]
    assert chains == ["encoder.block"] * 2 + ["decoder.block"] * 2
    assert [s.name for s in blocks_of(tiny_model("mixtral"))] == ["model.layers.0", "model.layers.1"]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.mark.parametrize("recipe", [RECIPE, "qronos@int4:g16", "smooth+gptq@int8:channel,a=minmax@int8:tensor"])
def test_a_run_killed_after_any_tensor_resumes_to_the_same_bytes(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama-tied", tmp_path / "float")
    ids = token_ids(6)

    def run(out: Path) -> None:
        lowbit.quantize(tmp_path / "float", recipe, out, calibration=ids)

    run(tmp_path / "whole")
    run(tmp_path / "again")
    assert digests(tmp_path / "whole") == digests(tmp_path / "again")
    original = driver.FolderWriter.write
    for stop in (0, 1, 4, 9, 13, 17):
        written = 0

        def write(self: Any, name: str, stored: Any, stop: int = stop, **facts: Any) -> None:
            nonlocal written
            if written == stop:
                raise KeyboardInterrupt
            written += 1
            original(self, name, stored, **facts)

        with monkeypatch.context() as patch:
            patch.setattr(driver.FolderWriter, "write", write)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / f"killed{stop}")
        assert not (tmp_path / f"killed{stop}").exists()
        run(tmp_path / f"killed{stop}")
        assert digests(tmp_path / f"killed{stop}") == digests(tmp_path / "whole")
        assert not (tmp_path / f"killed{stop}.partial").exists()


def test_a_finished_block_is_not_visited_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama-tied", tmp_path / "float")
    visited: list[int] = []
    blocks = BlockWalk.blocks

    def spy(self: BlockWalk) -> Any:
        for block in blocks(self):
            assert block.place_in_model is not None
            visited.append(block.place_in_model.index)
            if visited == [0, 1]:
                raise KeyboardInterrupt
            yield block

    monkeypatch.setattr(BlockWalk, "blocks", spy)
    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(tmp_path / "float", RECIPE, tmp_path / "out", calibration=token_ids(4))
    lowbit.quantize(tmp_path / "float", RECIPE, tmp_path / "out", calibration=token_ids(4))
    assert visited == [0, 1, 1]


def test_another_text_does_not_continue_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama-tied", tmp_path / "float")
    with monkeypatch.context() as patch:
        patch.setattr(driver.FolderWriter, "verify", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lowbit.quantize(tmp_path / "float", RECIPE, tmp_path / "out", calibration=token_ids(4))
    with pytest.raises(LowbitError, match="another model, recipe or version"):
        lowbit.quantize(tmp_path / "float", RECIPE, tmp_path / "out", calibration=token_ids(4, seed=1))


def test_the_manifest_says_what_it_was_calibrated_on(tmp_path: Path) -> None:
    save_tiny("llama-tied", tmp_path / "float")
    lowbit.quantize(tmp_path / "float", "w4", tmp_path / "out", calibration=token_ids(4))
    manifest = json.loads((tmp_path / "out" / "lowbit.json").read_text())
    assert manifest["calibration"]["windows"] == 4 and len(manifest["calibration"]["sha256"]) == 64
    assert manifest["recipe"]["name"] == "w4" and manifest["recipe"]["text"].startswith("qronos@int4:g32")
    entry = manifest["tensors"]["model.layers.0.mlp.down_proj.weight"]
    assert entry["output"]["final"] <= entry["output"]["nearest"] and entry["output"]["tokens"] == 96


def test_text_that_would_be_ignored_is_an_error() -> None:
    with pytest.raises(RecipeError, match="does not look at calibration text"):
        lowbit.quantize(tiny_model("llama"), "absmax@int8:channel", calibration=token_ids(2))


def test_the_fit_is_weighted_by_what_flows_through() -> None:
    """search with calibration text has less output error than without, on the same format."""
    model = tiny_model("llama")
    ids = token_ids(20)
    with_text = lowbit.quantize(model, "search@int3:g16", calibration=ids)
    without = lowbit.quantize(model, "search@int3:g16")
    probe = torch.stack(token_ids(8, seed=5))
    assert distance(model, with_text.model, probe) < distance(model, without.model, probe)


@pytest.mark.parametrize("recipe", ["awq+gptq@int4:g16", "smooth@int8:channel,a=int8:token", "rotate+gptq@int4:g16"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "opt"])
def test_transforms_compose_with_solvers(recipe: str, name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path / "float")
    made = lowbit.quantize(tmp_path / "float", recipe, tmp_path / "out", calibration=token_ids(8))
    float_model = tiny_model(name)
    probe = torch.stack(token_ids(4, seed=5))
    assert distance(float_model, made.model, probe) < (0.02 if "int8" in recipe else 0.1)
    assert filecmp.cmp(tmp_path / "out" / "lowbit.json", made.folder / "lowbit.json")  # type: ignore[operator]


def test_in_memory_and_by_files_agree(tmp_path: Path) -> None:
    save_tiny("llama-tied", tmp_path / "float")
    recipe = "smooth+gptq@int8:channel,a=minmax@int8:tensor"
    by_file = lowbit.quantize(tmp_path / "float", recipe, tmp_path / "out", calibration=token_ids(6))
    in_memory = lowbit.quantize(tiny_model("llama-tied"), recipe, calibration=token_ids(6))
    probe = token_ids(2, seed=3)[0][None]
    assert torch.equal(logits(by_file.model, probe), logits(in_memory.model, probe))


def test_windows_are_stacked_only_with_their_like() -> None:
    ids = [torch.arange(n) for n in (500, 500, 500, 7, 7, 3000)]
    shapes = [tuple(b.shape) for b in micro_batches(load_calibration(ids, None, _Bare(), samples=6).ids)]  # type: ignore[arg-type]
    assert shapes == [(2, 500), (1, 500), (2, 7), (1, 3000)]


class _Bare(nn.Module):
    """Something that load_calibration asks for the size of its vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.config = tiny_model("llama").config
        self.config.vocab_size = 10_000
        self.config.max_position_embeddings = 10_000


@pytest.mark.parametrize(
    "recipe", ["smooth@int8:channel,a=minmax@int8:tensor", "search@int8:channel,a=minmax@int8:tensor"]
)
def test_a_static_range_is_that_of_the_input_that_the_layer_sees(recipe: str) -> None:
    """Also where scaling changed the input after it was first seen."""
    ids = token_ids(8)
    made = lowbit.quantize(tiny_model("llama"), recipe, calibration=ids)
    names = [n for n, w in packed_weights(made.model) if w.inputs is not None]
    assert len(names) == 14
    for name in names:
        weight = made.model.get_submodule(name)
        x = hooked_inputs(made.model, [name], ids)[name]
        assert float(weight.input_scale) * 127 == pytest.approx(float(x.abs().max()), rel=0.02), name


RECIPES = [RECIPE, "qronos@int4:g16", "smooth+gptq@int8:channel,a=minmax@int8:tensor", "gptq+lkd(steps=2)@int4:g16"]


@pytest.mark.parametrize(
    ("recipe", "name"), mostly_nightly(RECIPES, ["llama", "t5", "gpt2"], every=lambda r, n: n == r % 3 or r == 0)
)
def test_cached_results_change_no_byte(recipe: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.blockwise.result_cache import ResultCache

    if recipe.startswith("smooth") and name == "t5":
        recipe = RECIPE
    computed = {"count": 0}
    result = ResultCache.result

    def count(self: ResultCache, compute: Any, costly: bool = False) -> Tensor:
        def counted() -> Tensor:
            computed["count"] += 1
            return compute()

        return result(self, counted, costly)

    def parts(made: Any) -> dict[str, Tensor]:
        return dict(made.model.state_dict())

    monkeypatch.setattr(ResultCache, "result", count)
    with_memory = parts(lowbit.quantize(tiny_model(name), recipe, calibration=token_ids(4)))
    fewer, computed["count"] = computed["count"], 0
    monkeypatch.setattr(ResultCache, "depends_on", lambda self, n: setattr(self, "_valid", False))
    without = parts(lowbit.quantize(tiny_model(name), recipe, calibration=token_ids(4)))
    assert all(torch.equal(with_memory[k], without[k]) for k in without)
    assert fewer < computed["count"]
