"""How text goes through a model is asked of its own code, and block by block is the whole model, whatever it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowbit
from lowbit.blockwise import quantizing
from lowbit.blockwise.places import TextPath
from lowbit.blockwise.quantizing import BlockwiseQuantizer
from lowbit.blockwise.skeleton import Skeleton
from lowbit.blockwise.text_path import text_path
from lowbit.blockwise.walk import FLOAT, BlockWalk
from lowbit.calibration.data import load_calibration
from lowbit.errors import RecipeError, SourceError
from lowbit.interchange.opening import open_source
from lowbit.planning.plan import make_plan
from lowbit.recipes.recipe import Recipe
from lowbit.solvers.stats import Stats
from tiny import TINY, VOCAB, tiny_model
from unusual_models import UNUSUAL, unusual_model

RECIPE = "gptq@int4:g16"


def token_ids(count: int = 4, length: int = 24, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB - 8, (length,), generator=generator) for _ in range(count)]


def path_of(model: Any) -> TextPath:
    source = open_source(model)
    return text_path(Skeleton(source, source.inventory.tied).module, token_ids(1, 16)[0][None])


@pytest.mark.parametrize("name", sorted(TINY))
def test_in_a_chain_each_block_needs_only_the_one_before(name: str) -> None:
    path = path_of(tiny_model(name))
    assert path.reader == "" and not path.handed
    encoder = sum(place.chain.startswith("encoder") for place in path.places)
    for i in range(1, len(path.places)):
        assert path.needed[i] == {i - 1} | ({encoder - 1} if 0 < encoder < i else set()), i
    assert path.looked_up <= 1 + encoder  # embeddings are read by the first block of each side only


def test_what_is_no_chain_is_seen() -> None:
    xlm = path_of(unusual_model("xlm"))
    assert [p.name.rpartition("transformer.")[2] for p in xlm.places] == [
        "attentions.0",
        "ffns.0",
        "attentions.1",
        "ffns.1",
    ]
    assert xlm.needed[3] == {0, 1, 2}  # every sum holds all that came before
    llava = path_of(unusual_model("llava"))
    assert all("language_model" in p.name for p in llava.places) and not any("vision" in n for n in llava.used)
    assert path_of(unusual_model("clip")).reader == "text_model"
    gemma = path_of(unusual_model("gemma3n"))
    assert gemma.putting and gemma.handed == {"shared_kv_states"}
    assert [p.chain for p in path_of(unusual_model("albert")).places] == [""]
    assert path_of(unusual_model("zamba")).looked_up == 4  # the second hybrid layer is the last that reads embeddings
    funnel = path_of(unusual_model("funnel"))
    assert 0 in funnel.needed[-2]  # the decoder reads what the first block returned


def test_a_model_that_reads_no_text_says_so() -> None:
    import transformers

    vit = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=32
    )
    with pytest.raises(SourceError, match="ViTModel reads pixel_values, not text"):
        path_of(transformers.ViTModel(vit))


def all_inputs(model: Any, reader: str, names: list[str], ids: list[Tensor]) -> dict[str, Tensor]:
    """The inputs of linear layers by ordinary forward hooks in the whole model, every call, all windows together."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(n.removesuffix(".weight")).register_forward_pre_hook(
            lambda m, args, n=n: seen[n].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for n in names
    ]
    for window in ids:
        extra = {"decoder_input_ids": window[None]} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            model.get_submodule(reader)(input_ids=window[None], use_cache=False, **extra)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("name", sorted(UNUSUAL))
def test_statistics_are_those_of_the_whole_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each step the inputs are those of the ordinary model in which exactly the weights that were solved before are quantized."""
    model, shadow = unusual_model(name), unusual_model(name)
    source, ids = open_source(model), token_ids()
    plan = make_plan(source, Recipe.parse(RECIPE + ",embed=keep"))
    reader, checked = path_of(model).reader, set()

    def watch(plans: Any, weights: Any, recipe: Any, stats: Any) -> Any:
        names = [p.name for p in plans]
        assert isinstance(stats, Stats)
        for weight, x in all_inputs(shadow, reader, names, ids).items():
            x = x[: stats.tokens]  # of a weight that later blocks share: the first block's
            moment = x.T @ x / len(x)
            assert float((stats.second_moment - moment).norm() / moment.norm()) < 1e-4, weight
        checked.update(names)
        found = original(plans, weights, recipe, stats)
        for solved in found:
            shadow.get_parameter(solved.plan.name).data.copy_(solved.qtensor().dequantize())
        return found

    original = quantizing.solve_group
    monkeypatch.setattr(quantizing, "solve_group", watch)
    calibration = load_calibration(ids, None, source, samples=4)
    run = BlockwiseQuantizer(plan, source, calibration, tmp_path, torch.float32)
    solved = {s.plan.name: s for s, _ in run.results()}
    multiplied = {t.name for t in plan.tensors if t.format is not None and t.kind == "linear"}
    assert set(solved) == {t.name for t in plan.tensors} and checked
    assert {n for n in multiplied - checked if "not used while" not in solved[n].note} <= {
        n for n in multiplied if "head" in n
    }


@pytest.mark.parametrize("name", ["zamba", "gemma3n", "xlm", "t5"])
def test_a_killed_run_goes_on_to_the_same_bytes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tiny_model(name) if name in TINY else unusual_model(name)).save_pretrained(tmp_path / "float")

    def run(out: Path) -> dict[str, bytes]:
        lowbit.quantize(tmp_path / "float", "qronos@int4:g16", out, calibration=token_ids(3))
        return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}

    whole, blocks = run(tmp_path / "whole"), BlockWalk.blocks

    def some(self: BlockWalk) -> Any:
        for i, block in enumerate(blocks(self)):
            if i == 3:
                raise KeyboardInterrupt
            yield block

    with monkeypatch.context() as patch:
        patch.setattr(BlockWalk, "blocks", some)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
    assert run(tmp_path / "killed") == whole


@pytest.mark.parametrize("name", ["zamba", "gemma3n", "funnel", "llava"])
def test_the_float_stream_ends_in_the_float_models_output(name: str, tmp_path: Path) -> None:
    """While the quantized stream has other weights, shared ones among them."""
    model = unusual_model(name)
    source = open_source(model)
    walk = BlockWalk(make_plan(source, Recipe.parse(RECIPE)), source, token_ids(2), tmp_path, torch.float32, whole=True)
    walk.place_outside()
    for block in walk.blocks():
        for batch in range(block.batches):
            found = block.run(batch, FLOAT)
            block.save(batch, found, FLOAT)
        for weight in block.multiplied:
            block.place(weight, block.weights[weight] * 1.5)
        for batch in range(block.batches):
            block.save(batch, block.run(batch))
    with torch.no_grad():
        wanted = model(input_ids=torch.stack(token_ids(2)), use_cache=False).logits
    assert not block.returns and torch.allclose(found.logits, wanted, atol=1e-4)


def test_weights_that_text_does_not_come_to_are_solved_without_and_counted(tmp_path: Path) -> None:
    made = lowbit.quantize(unusual_model("llava"), RECIPE, calibration=token_ids())
    unread = [x.name for x in made.report.layers if "not used while" in x.note]
    assert unread and all("vision" in n or "projector" in n for n in unread)
    plain = lowbit.quantize(unusual_model("llava"), "search@int4:g16", effort="none")
    errors = {x.name: x.error for x in plain.report.layers}
    assert all(x.error == pytest.approx(errors[x.name], rel=0.2) for x in made.report.layers if x.name in unread)
    with pytest.raises(RecipeError, match="text does not come to .*vision"):
        lowbit.quantize(
            unusual_model("llava"), "smooth+gptq@int8:channel,a=minmax@int8:tensor", calibration=token_ids()
        )
