"""A walk over the blocks of a model: whoever visits it sees what the whole model would compute, and goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowbit
from lowbit.blockwise.block_tuner import hidden
from lowbit.blockwise.walk import FLOAT, STATES, Block, BlockWalk
from lowbit.interchange.opening import open_source
from lowbit.planning.plan import make_plan
from lowbit.recipes.recipe import Recipe
from tiny import VOCAB, tiny_model

WINDOWS = [torch.randint(3, VOCAB, (24,), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def walk_over(name: str, folder: Path, recipe: str = "absmax@int4:g16", **options: Any) -> BlockWalk:
    source = open_source(tiny_model(name))
    return BlockWalk(make_plan(source, Recipe.parse(recipe)), source, WINDOWS, folder, torch.float32, **options)


def measured(walk: BlockWalk, quantized: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    """A visitor that measures: how far the output of each block is from the float model's, weights of earlier blocks being
    quantized too; last the same of the model's own output."""
    walk.place_outside()
    for block in walk.blocks():
        wanted = [block.run(batch, FLOAT) for batch in range(block.batches)]
        for name in block.multiplied:
            block.place(name, quantized[name])
        error = size = 0.0
        for batch, right in enumerate(wanted):
            found = block.run(batch)
            block.save(batch, right, FLOAT)
            block.save(batch, found)
            x, y = (hidden(out) if block.returns else out.logits for out in (found, right))
            error, size = error + float((x - y).square().sum()), size + float(y.square().sum())
        yield block.name, (error / size) ** 0.5


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "mixtral"])
def test_measuring_block_by_block_is_measuring_the_whole_model(name: str, tmp_path: Path) -> None:
    made = lowbit.quantize(tiny_model(name), "absmax@int4:g16,embed=keep")
    dense = {s.plan.name: d for s, _ in made._solved if (d := s.dense()) is not None}
    found = dict(measured(walk_over(name, tmp_path, "absmax@int4:g16,embed=keep", whole=True), dense))
    rough, right = tiny_model(name), tiny_model(name)
    for weight, value in dense.items():
        rough.get_parameter(weight).data.copy_(value)
    ids = torch.stack(WINDOWS)
    with torch.no_grad():
        a, b = (m(input_ids=ids, output_hidden_states=True) for m in (rough.eval(), right.eval()))
    first = float((a.hidden_states[1] - b.hidden_states[1]).norm() / b.hidden_states[1].norm())
    whole = float((a.logits - b.logits).norm() / b.logits.norm())
    assert list(found) == ["model.layers.0", "model.layers.1", ""]
    assert found["model.layers.0"] == pytest.approx(first, rel=1e-3)
    assert found[""] == pytest.approx(whole, rel=1e-3)
    assert not list(tmp_path.rglob("*.safetensors"))


def names_of(walk: BlockWalk, stop: int | None = None) -> list[str]:
    walk.place_outside()
    names = []
    for i, block in enumerate(walk.blocks()):
        names.append(block.name)
        if i == stop:
            break
        for batch in range(block.batches):
            block.save(batch, block.run(batch))
    return names


def test_a_walk_goes_on_behind_the_last_whole_block(tmp_path: Path) -> None:
    assert names_of(walk_over("t5", tmp_path), stop=2) == ["encoder.block.0", "encoder.block.1", "decoder.block.0"]
    again = walk_over("t5", tmp_path)
    done = {n for n in again.tensors if n.startswith("encoder.block.")}
    assert again.finished == done and len(done) > 10
    assert names_of(again) == ["decoder.block.0", "decoder.block.1"]
    assert not (tmp_path / STATES).exists() and walk_over("t5", tmp_path).finished == frozenset()


def test_one_block_has_its_weights_at_a_time(tmp_path: Path) -> None:
    walk, before = walk_over("llama", tmp_path), []
    walk.place_outside()
    for block in walk.blocks():
        assert block.weights and all(not other.weights for other in before)
        with_weights = [n for n, p in walk._skeleton.module.named_parameters() if ".layers." in n and not p.is_meta]
        assert set(with_weights) == set(block.weights)
        before.append(block)
        for batch in range(block.batches):
            block.save(batch, block.run(batch))


def test_the_inputs_that_a_visitor_sees_are_those_of_the_weights(tmp_path: Path) -> None:
    walk = walk_over("llama", tmp_path)
    walk.place_outside()
    block: Block = next(walk.blocks())
    seen: dict[str, Tensor] = {}
    with block.capture(lambda name, expert, x: seen.setdefault(name, x) if name.endswith("q_proj.weight") else None):
        block.run(0)
    model = tiny_model("llama").eval()
    ids = walk.batches[0]
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    assert set(block.multiplied) == {n for n in block.weights if n.endswith("_proj.weight")}
    assert torch.allclose(seen["model.layers.0.self_attn.q_proj.weight"], x, atol=1e-6)
    first = [n.split(".")[-2] for group in block.passes()[0] for n in group.members]
    assert first == ["q_proj", "k_proj", "v_proj"]
