"""What error feedback leaves: against GPTQ itself, on one layer and as the KL of a model with one layer quantized."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_sensitivity import kl_of, text
from torch import Tensor, nn

import lowbit
from lowbit.blockwise.capture import InputCapture
from lowbit.budget import sensitivity as module
from lowbit.budget.choose import allocation
from lowbit.budget.feedback import remaining_errors
from lowbit.budget.sensitivity import Sensitivity, estimate_sensitivity, measure_sensitivity
from lowbit.errors import SourceError
from lowbit.formats import parse_format
from lowbit.interchange.opening import open_source
from lowbit.solvers import Call
from lowbit.solvers.stats import StatsBuilder
from tiny import VOCAB, tiny_model

GPTQ = Call("gptq", (("polish", 0),))


class Reader(nn.Module):
    """One layer that reads vectors whose channels resemble each other as much as `alike` says."""

    def __init__(self, width: int, alike: float, tokens: int = 4000) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        mixed = torch.randn(width, width, generator=generator) * alike + torch.eye(width)
        size = torch.randn(width, generator=generator).exp()
        self.table = nn.Embedding(tokens, width)
        self.table.weight.data = torch.randn(tokens, width, generator=generator) @ mixed * size
        self.layer = nn.Linear(width, 192, bias=False)
        self.layer.weight.data = torch.randn(192, width, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.table(ids))


@pytest.mark.parametrize("alike", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("tokens", [512, 4096])
def test_the_share_is_what_gptq_leaves(alike: float, tokens: int) -> None:
    model, width = Reader(128, alike).eval(), 128
    ids = text(4000, tokens)[0].view(-1, 64)
    weight = model.layer.weight.detach()
    share = remaining_errors(model, {"layer.weight": model.layer.weight}, list(ids), False)["layer.weight"]
    builder = StatsBuilder(width)
    builder.add(model.table.weight.detach())  # of all that there is to read, not of the sample
    stats = builder.stats()
    fmt = parse_format("int5:channel")
    moment = stats.second_moment.double()

    def loss(solver: Call) -> float:
        d = (solver(weight, fmt, Call("search"), stats).dequantize() - weight).double()
        return float((d @ moment * d).sum())

    real = loss(GPTQ) / loss(Call("rtn"))
    found = float((share * moment.diagonal()).sum() / moment.diagonal().sum())
    assert found == pytest.approx(real, rel=0.25)
    assert bool((share > 0).all()) and bool((share <= 1).all())


def test_layers_that_read_the_same_have_the_same_share_and_experts_have_one() -> None:
    model = tiny_model("mixtral")
    before = model.config._experts_implementation
    found = measure_sensitivity(open_source(model), text(VOCAB, 2048), ["int4:g16"], sequences=4, length=32)
    assert set(found.feedback) == {n for n, p in open_source(model).inventory.params.items() if p.keep is None} - {
        "model.embed_tokens.weight", "lm_head.weight",
    }  # fmt: skip
    assert all(0 < left <= 1 for left in found.feedback.values())
    assert model.config._experts_implementation == before
    q, k = (found.feedback[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qk")
    assert q == pytest.approx(k, rel=0.1), "one input, and outputs that weigh its channels a little differently"


def solved_alone(model: nn.Module, ids: list[Tensor], names: list[str], fmt: str, solver: Call) -> Iterator[Tensor]:
    """Each weight, solved on what it reads in the float model."""
    builders: dict[str, StatsBuilder] = {}

    def add(name: str, expert: int | None, x: Tensor) -> None:
        builders.setdefault(name, StatsBuilder(x.shape[-1])).add(x)

    with torch.no_grad(), InputCapture({n: model.get_parameter(n) for n in names}, add):
        for piece in ids:
            model(piece[None])
    for name in names:
        weight = model.get_parameter(name).detach()
        yield solver(weight, parse_format(fmt), Call("search"), builders[name].stats()).dequantize()


def ranks(values: list[float]) -> Tensor:
    return torch.tensor(values).argsort().argsort().double()


def test_the_prediction_is_the_kl_of_each_layer_that_is_solved_alone() -> None:
    model = tiny_model("llama-tied")
    ids = list(text(VOCAB, 48 * 64)[0].view(-1, 64))
    found = measure_sensitivity(open_source(model), ids, ["int3:g16", "int5:g16"], sequences=48, length=64)
    names = list(found.feedback)
    predicted, real = [], []
    for fmt in found.candidates:
        for name, solved in zip(names, solved_alone(model, ids, names, fmt, GPTQ)):
            predicted.append(found.solved_by(GPTQ).kl[name][fmt] / module._BEYOND)
            real.append(kl_of(model, ids[::6], name, solved))
    correlation = torch.corrcoef(torch.stack([ranks(predicted), ranks(real)]))[0, 1]
    assert float(correlation) > 0.95, list(zip(names * 2, predicted, real))
    ratios = torch.tensor(predicted) / torch.tensor(real)
    assert float(ratios.log().mean().exp()) == pytest.approx(1, abs=0.3)
    assert float(ratios.min()) > 0.4 and float(ratios.max()) < 2.5, list(zip(names * 2, predicted, real))


def test_only_solvers_that_feed_errors_back_leave_less() -> None:
    kl = {"a": {"int4:g16": 1.0, "kmeans4:channel": 1.0}, "b": {"int4:g16": 1.0, "kmeans4:channel": 1.0}}
    found = Sensitivity("", {}, "fisher", {}, ("int4:g16", "kmeans4:channel"), kl, kl, {"a": 0.2})
    for solver in (None, Call("rtn")):
        assert found.solved_by(solver) is found
    assert replace(found, feedback={}).solved_by(GPTQ).kl == kl
    left = found.solved_by(GPTQ).kl
    assert left["a"] == {"int4:g16": pytest.approx(0.2 * module._BEYOND), "kmeans4:channel": 1.0}
    assert left["b"] == kl["b"], "an embedding has no inputs"


def test_a_recipe_without_feedback_is_allocated_as_before() -> None:
    model = tiny_model("llama")
    source = open_source(model)
    found = measure_sensitivity(source, text(VOCAB, 2048), ["int3:g16", "int5:g16", "int8:g16"], sequences=8, length=32)
    plain = replace(found, feedback={})
    assert allocation(source, found, "search@int4:g16", target_bits=6) == allocation(
        source, plain, "search@int4:g16", target_bits=6
    )
    back, without = (allocation(source, s, "gptq@int4:g16", target_bits=6) for s in (found, plain))
    assert back.predicted_kl < without.predicted_kl
    limit = back.predicted_kl
    small = allocation(source, found, "gptq@int4:g16", target_kl=limit)
    assert small.predicted_kl <= limit and small.plan.output_bytes <= back.plan.output_bytes


def test_a_file_of_the_first_version_is_read(tmp_path: Path) -> None:
    source = open_source(tiny_model("gpt2"))
    path = estimate_sensitivity(source, ["int3:g32", "int6:g32"]).save(tmp_path / "s.json")
    content = json.loads(path.read_text())
    assert content.pop("lowbit_sensitivity") == 2 and content.pop("feedback") == {}
    path.write_text(json.dumps({"lowbit_sensitivity": 1, **content}))
    found = Sensitivity.load(path)
    assert found.feedback == {} and found.solved_by(GPTQ) is found
    for damage in ({"feedback": {"x": -1.0}}, {"feedback": {"x": "y"}}, {"feedback": 3}, {"lowbit_sensitivity": 3}):
        path.write_text(json.dumps({"lowbit_sensitivity": 2, **content, **damage}))
        with pytest.raises(SourceError, match="measure it again"):
            Sensitivity.load(path)


def test_one_thread_or_two_choose_the_same() -> None:
    model, threads = tiny_model("llama"), torch.get_num_threads()
    source = open_source(model)
    try:
        made = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found = measure_sensitivity(source, text(VOCAB, 4096), ["int3:g16", "int6:g16"], sequences=4)
            made.append((found, allocation(source, found, "gptq@int4:g16", target_bits=5).recipe))
    finally:
        torch.set_num_threads(threads)
    (one, first), (two, second) = made
    assert first == second and one.fingerprint == two.fingerprint
    for name, by in one.kl.items():
        assert two.kl[name] == pytest.approx(by, rel=1e-4)
    assert two.feedback == pytest.approx(one.feedback, rel=1e-3)


def test_the_file_keeps_what_feedback_leaves(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    given = {"candidates": ("int3:g16", "int6:g16"), "sensitivity": path, "target_bits": 5.0}
    model = tiny_model("llama")
    first = lowbit.allocate(
        model, "gptq@int4:g16", calibration=[x for s in range(4) for x in text(VOCAB, 512, s)], **given
    )
    assert Sensitivity.load(path).feedback and lowbit.allocate(model, "gptq@int4:g16", **given) == first
