"""Sensitivity: against the exact Fisher information of a small model, and against the KL that is really measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.budget import fisher, rounding_cost
from lowbit.budget.choose import allocation
from lowbit.budget.fisher import EVERY, squared_gradients
from lowbit.budget.sensitivity import Sensitivity, estimate_sensitivity, measure_sensitivity
from lowbit.errors import OutputError, RecipeError, SourceError, TextError
from lowbit.interchange.opening import open_source
from tiny import VOCAB, tiny_model


class Bigram(nn.Module):
    """logits = head(table[id]): each position stands alone, so the Fisher information is a short formula."""

    def __init__(self, tokens: int = 24, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(tokens, width)
        self.head = nn.Linear(width, tokens, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def text(tokens: int, count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, tokens, (count,), generator=generator)]


def exact_fisher(model: Bigram, ids: Tensor) -> tuple[Tensor, Tensor]:
    """E[G^2] of head and table, summed over positions that are independent, every label weighed by its probability.

    A table row is read at several positions, whose scores are independent too, so that squares add.
    """
    with torch.no_grad():
        x = model.table(ids)
        p = model(ids).softmax(-1)
        head, table = torch.zeros_like(model.head.weight), torch.zeros_like(model.table.weight)
        for t, token in enumerate(ids):
            for label, weight in enumerate(p[t]):
                score = -p[t].clone()
                score[label] += 1
                head += weight * torch.outer(score, x[t]).square()
                table[token] += weight * (model.head.weight.T @ score).square()
    return head, table


def kl_of(model: nn.Module, ids: list[Tensor], name: str, weight: Tensor) -> float:
    """The KL in nats per token when one parameter is replaced, in float64."""
    param = model.get_parameter(name)
    with torch.no_grad():
        total, before = 0.0, param.clone()
        for piece in ids:
            out = model(piece[None])
            p = getattr(out, "logits", out)[0].double().log_softmax(-1)
            param.copy_(weight)
            out = model(piece[None])
            param.copy_(before)
            q = getattr(out, "logits", out)[0].double().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(ids)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights rounded without importance, so that a test can round them alike."""
    monkeypatch.setattr(rounding_cost, "_rounded", lambda w, fmt, _: lowbit.quantize_tensor(w, fmt).dequantize())


@pytest.mark.usefixtures("plain")
def test_the_prediction_is_the_exact_fisher_information() -> None:
    model = Bigram().eval()
    ids = text(24, 16 * 400)
    found = measure_sensitivity(open_source(model), ids, ["int4:g16"], sequences=400, length=16)
    fisher = dict(zip(("head.weight", "table.weight"), exact_fisher(model, ids[0])))
    for name, exact in fisher.items():
        weight = model.get_parameter(name).detach()
        changed = lowbit.quantize_tensor(weight, "int4:g16").dequantize() - weight
        predicted = float((exact * changed.square()).sum()) / (2 * len(ids[0]))
        assert found.kl[name]["int4:g16"] == pytest.approx(predicted, rel=0.1)  # labels are drawn
        assert found.error[name]["int4:g16"] == pytest.approx(float(changed.norm() / weight.norm()), rel=1e-5)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("arch", ["llama-tied", "gpt2", "qwen3-moe"])
def test_the_prediction_is_the_kl_that_comes_out(arch: str) -> None:
    """Of each matrix alone at 6 bits; in sum closely, each within what single draws of rounding errors allow."""
    model = tiny_model(arch)
    ids = text(VOCAB, 32 * 96)
    source = open_source(model)
    found = measure_sensitivity(source, ids, ["int6:g16"], sequences=96, length=32)
    pieces = list(ids[0].view(-1, 32))[::8]
    predicted, real = [], []
    for name in found.kl:
        weight = model.get_parameter(name).detach()
        turned = source.inventory.params[name].transposed
        q = lowbit.quantize_tensor(weight.transpose(-1, -2) if turned else weight, "int6:g16").dequantize()
        predicted.append(found.kl[name]["int6:g16"])
        real.append(kl_of(model, pieces, name, q.transpose(-1, -2) if turned else q))
    assert sum(predicted) == pytest.approx(sum(real), rel=0.25)
    ratios = torch.tensor(predicted) / torch.tensor(real)
    assert float(ratios.min()) > 0.3 and float(ratios.max()) < 3, dict(zip(found.kl, ratios.tolist()))


def ranks(values: list[float]) -> Tensor:
    return torch.tensor(values).argsort().argsort().double()


def test_layers_and_formats_rank_as_when_each_is_tried_alone() -> None:
    """Against brute force: the model run with one layer quantized, for each layer and format. The layers are made to differ."""
    model = tiny_model("llama-tied")
    for i, p in enumerate(p for n, p in model.named_parameters() if n.endswith("_proj.weight")):
        p.data *= 1 + i % 3
    ids = text(VOCAB, 32 * 96)
    found = measure_sensitivity(open_source(model), ids, ["int3:g16", "int4:g16", "int6:g16"], length=32)
    pieces, predicted, real = list(ids[0].view(-1, 32))[::12], [], []
    for name in found.kl:
        weight = model.get_parameter(name).detach()
        for fmt in found.candidates:
            predicted.append(found.kl[name][fmt])
            real.append(kl_of(model, pieces, name, lowbit.quantize_tensor(weight, f"search@{fmt}").dequantize()))
    correlation = torch.corrcoef(torch.stack([ranks(predicted), ranks(real)]))[0, 1]
    assert float(correlation) > 0.95
    ratios = torch.tensor(predicted) / torch.tensor(real)
    assert float(ratios.min()) > 0.3 and float(ratios.max()) < 3


def test_one_thread_or_two_choose_the_same() -> None:
    source, threads = open_source(tiny_model("llama")), torch.get_num_threads()
    made = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found = measure_sensitivity(source, text(VOCAB, 4096), ["int3:g16", "int6:g16"], sequences=4)
            made.append((found, allocation(source, found, "search@int4:g16", target_bits=5).recipe))
    finally:
        torch.set_num_threads(threads)
    (one, first), (two, second) = made
    assert first == second and one.fingerprint == two.fingerprint
    for name, by in one.kl.items():
        assert two.kl[name] == pytest.approx(by, rel=1e-4)


def test_embeddings_are_differentiated_in_every_fourth_sequence() -> None:
    """The mean over those sequences; where there is nothing but embeddings, over all."""
    model, rows = Bigram().eval(), list(text(24, 9 * 16)[0].view(9, 16))
    both = squared_gradients(model, {"head.weight": False, "table.weight": True}, rows, 0, False)
    every = squared_gradients(model, {"head.weight": False, "table.weight": False}, rows, 0, False)
    single = [squared_gradients(model, {"table.weight": True}, [row], 0, False)["table.weight"] for row in rows]
    assert torch.equal(both["head.weight"], every["head.weight"])
    touched = {int(i) for row in rows[::EVERY] for i in row}
    found = both["table.weight"].sum(1) > 0
    assert {int(i) for i in found.nonzero()[:, 0]} == touched
    assert all(bool((s.sum(1) > 0).any()) for s in single), "alone it is differentiated in each"


def test_labels_are_drawn_as_often_as_they_are_probable() -> None:
    logits = torch.tensor([2.0, -torch.inf, 0.5, -1.0, 0.0])
    p = logits.softmax(0)
    drawn = fisher._drawn(p.log().expand(40_000, 5), torch.Generator().manual_seed(0))[:, 0]
    counts = torch.bincount(drawn, minlength=5) / len(drawn)
    assert counts[1] == 0
    assert torch.allclose(counts, p, atol=4 * 0.5 / len(drawn) ** 0.5)


def test_a_tied_matrix_answers_for_both_of_its_uses() -> None:
    """Untied, the two uses are two tensors; tied, the prediction is near the sum and above either."""
    tied = tiny_model("llama-tied")
    apart = tiny_model("llama-tied")
    apart.lm_head.weight = nn.Parameter(apart.model.embed_tokens.weight.detach().clone())
    apart.config.tie_word_embeddings = False
    ids = text(VOCAB, 32 * 64)
    whole = measure_sensitivity(open_source(tied), ids, ["int5:g16"], length=32).kl
    parts = measure_sensitivity(open_source(apart), ids, ["int5:g16"], length=32).kl
    one, two = (parts[n]["int5:g16"] for n in ("model.embed_tokens.weight", "lm_head.weight"))
    assert max(one, two) * 1.02 < whole["model.embed_tokens.weight"]["int5:g16"]
    assert whole["model.embed_tokens.weight"]["int5:g16"] == pytest.approx(one + two, rel=0.3)


@pytest.mark.parametrize("arch", ["t5", "bert", "mamba", "mixtral", "falcon"])
def test_any_kind_of_model_is_measured(arch: str, tiny_folder: Callable[[str], Path]) -> None:
    source = open_source(tiny_folder(arch))
    found = measure_sensitivity(source, text(VOCAB, 512), ["int3:g32", "int8:g32"], sequences=8, length=32)
    assert set(found.kl) == {n for n, p in source.inventory.params.items() if p.keep is None}
    assert all(0 < by["int8:g32"] < by["int3:g32"] for by in found.kl.values())


def test_an_expert_that_no_token_reached_is_like_the_others() -> None:
    model = Bigram()
    model.spare = nn.Linear(32, 24, bias=False)
    found = measure_sensitivity(open_source(model.eval()), text(24, 256), ["int3:g16", "int6:g16"], length=16)
    low, high = sorted(
        found.kl[n]["int3:g16"] / found.error[n]["int3:g16"] ** 2 for n in ("head.weight", "table.weight")
    )
    assert low * 0.5 < found.kl["spare.weight"]["int3:g16"] / found.error["spare.weight"]["int3:g16"] ** 2 < high * 2


def test_the_model_is_left_as_it_was() -> None:
    model = Bigram().eval()
    model.table.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = [p.detach().clone() for p in model.parameters()]
    measure_sensitivity(open_source(model), text(24, 64), ["int4:g16"], sequences=4, length=16)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert not model.table.weight.requires_grad and model.head.weight.requires_grad
    assert bool((model.head.weight.grad == 1).all()) and model.table.weight.grad is None


def test_same_seed_same_numbers() -> None:
    source, ids = open_source(Bigram().eval()), text(24, 256)
    runs = [measure_sensitivity(source, ids, ["int4:g16"], length=16, seed=s) for s in (0, 0, 1)]
    assert runs[0] == runs[1] and runs[0].fingerprint == runs[1].fingerprint
    assert runs[0].kl != runs[2].kl and runs[0].fingerprint != runs[2].fingerprint
    other = measure_sensitivity(source, text(24, 256, seed=5), ["int4:g16"], length=16)
    assert other.fingerprint != runs[0].fingerprint


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    source = open_source(Bigram().eval())
    found = measure_sensitivity(source, text(24, 256), ["int4:g16", "int2:g16"], length=16)
    back = Sensitivity.load(found.save(tmp_path / "s.json"))
    assert back == found
    back.check(source)
    other = Bigram().eval()
    other.head.weight.data += 1
    with pytest.raises(RecipeError, match="measured on another model"):
        back.check(open_source(other))


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    path = measure_sensitivity(open_source(Bigram().eval()), text(24, 64), ["int4:g16"], length=16).save(tmp_path / "s")
    whole = json.loads(path.read_text())
    name = "head.weight"
    for damage in (
        {"candidates": ["int5:g16"]}, {"fingerprint": "0"}, {"kl": {name: {"int4:g16": -1.0}}}, {"kl": {name: {}}},
        {"kl": {name: {"int4:g16": "x"}}}, {"kl": 3}, {"more": 1}, {"lowbit_sensitivity": 99},
    ):  # fmt: skip
        path.write_text(json.dumps({**whole, **damage}))
        with pytest.raises(SourceError, match="measure it again"):
            Sensitivity.load(path)
    for content in ("", "[]", "3", "{}"):
        path.write_text(content)
        with pytest.raises(SourceError, match="no sensitivity file"):
            Sensitivity.load(path)
    with pytest.raises(SourceError, match="cannot be read"):
        Sensitivity.load(tmp_path / "none.json")
    with pytest.raises(OutputError, match="cannot write"):
        Sensitivity("", {}, "", {}, (), {}, {}).save(tmp_path / "no" / "s.json")


def test_factors_scale_formats() -> None:
    found = estimate_sensitivity(open_source(Bigram().eval()), ["int4:g16", "int2:g16"])
    half = found.scaled({"int2:g16": 0.5})
    assert half.kl["head.weight"]["int2:g16"] == found.kl["head.weight"]["int2:g16"] / 2
    assert half.kl["head.weight"]["int4:g16"] == found.kl["head.weight"]["int4:g16"]
    with pytest.raises(RecipeError, match="not among the formats"):
        found.scaled({"int3:g16": 0.5})


def test_the_guess_needs_no_text_and_follows_the_error() -> None:
    source = open_source(tiny_model("gpt2"))
    found = estimate_sensitivity(source, ["int3:g32", "int6:g32"])
    weight = source.read("transformer.h.0.attn.c_attn.weight").T.contiguous()
    q = lowbit.quantize_tensor(weight, "search@int3:g32").dequantize()
    error = float((q - weight).norm() / weight.norm())
    name = "transformer.h.0.attn.c_attn.weight"
    assert found.error[name]["int3:g32"] == pytest.approx(error, rel=1e-4)
    ratio = found.kl[name]["int3:g32"] / found.kl[name]["int6:g32"]
    assert ratio == pytest.approx((error / found.error[name]["int6:g32"]) ** 2, rel=1e-4)


def test_what_cannot_be_measured_is_an_error() -> None:
    source = open_source(Bigram().eval())
    with pytest.raises(TextError, match="20 tokens, fewer than 2 sequences of 16"):
        measure_sensitivity(source, text(24, 20), length=16)
    with pytest.raises(RecipeError, match="no formats to choose from"):
        measure_sensitivity(source, text(24, 64), [], length=16)
    with pytest.raises(RecipeError, match="measure nothing"):
        measure_sensitivity(source, text(24, 64), length=1)
    with pytest.raises(SourceError, match="no logits"):
        measure_sensitivity(open_source(tiny_model("bert").bert), text(24, 64), length=16)


def test_embeddings_are_measured_in_the_format_that_recipes_give_them() -> None:
    found = measure_sensitivity(open_source(Bigram().eval()), text(24, 64), ["int4:g16"], length=16)
    assert set(found.kl["table.weight"]) == {"int4:g16", "int8:channel"} and set(found.kl["head.weight"]) == {
        "int4:g16"
    }
    assert replace(found).candidates == ("int4:g16",)


def test_a_file_of_another_text_or_other_candidates_is_refused(tmp_path: Path) -> None:
    model, path = tiny_model("llama"), tmp_path / "sensitivity.json"
    candidates = ("int4:g16", "int8:g16")

    def run(seed: int = 0, **other: Any) -> Any:
        given = {
            "calibration": [x for i in range(4) for x in text(VOCAB, 128, 9 * seed + i)],
            "candidates": candidates,
            "sensitivity": path,
        } | other
        return lowbit.allocate(model, "search@int4:g16", target_bits=6.0, **given)

    first = run()
    assert run(candidates=candidates[::-1]).recipe == first.recipe, "read again, in whatever order"
    assert run(calibration=None).recipe == first.recipe, "a text that is not at hand is not compared"
    with pytest.raises(RecipeError, match="another calibration text.*another file"):
        run(seed=1)
    with pytest.raises(RecipeError, match="formats int4:g16, int8:g16 and not int4:g16, int6:g16"):
        run(candidates=("int4:g16", "int6:g16"))
    content = json.loads(path.read_text())
    assert content["candidates"] == list(candidates) and len(content["settings"]["calibration"]) == 64
