"""Recommendations: sizes as the plan has them, never worse with more memory, and commands that make what was said."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

import lowbit
from lowbit.budget.memory import OVERHEAD, longest_context, running_memory
from lowbit.cli.main import app
from lowbit.errors import LowbitError, RecipeError
from lowbit.interchange.hub import hub
from lowbit.measure.expected_loss import MEASURED, MIXES, expected_of_format
from lowbit.planning.kv_cache import CacheLayer, KVCache
from lowbit.report.choices import AS_IT_IS, active_experts
from lowbit.report.recommendation import ACCEPTABLE, Recommendation, about
from tiers import mostly_nightly

Float = Callable[[str], Path]
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PLENTY = 10**12
TARGETS = ("lowbit", "gguf", "vllm", "gptq", "awq")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog and runs away again . " * 200)
    return path


def test_memory_is_that_of_the_plan_and_of_a_naive_cache(tiny_folder: Float) -> None:
    found = lowbit.recommend(tiny_folder("llama"), PLENTY, 100)
    config = transformers.AutoConfig.from_pretrained(tiny_folder("llama"))
    cache = sum(
        2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 2
        for _ in range(100) for _ in range(config.num_hidden_layers)
    )  # fmt: skip
    assert len(found.choices) > 3
    for choice in found.choices:
        assert choice.memory.weights == lowbit.plan(tiny_folder("llama"), choice.recipe).output_bytes
        assert choice.memory.cache == cache and choice.memory.working == OVERHEAD
        assert choice.memory.total == choice.memory.weights + cache + OVERHEAD


def test_what_another_program_takes_for_itself_is_not_counted_but_said(tiny_folder: Float) -> None:
    """So that a model that llama.cpp runs is not refused for the memory that Python takes."""
    found = lowbit.recommend(tiny_folder("llama"), 5_000_000, 100, "gguf")
    assert found.best is not None and all(choice.memory.working == 0 for choice in found.choices)
    assert "for the program" not in str(found) and "comes on top" in str(found)
    assert lowbit.recommend(tiny_folder("llama"), 5_000_000, 100).best is None


def test_no_weight_is_read_and_defaults_are_said(tiny_folder: Float, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.interchange.readers import folder

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a recommendation read a tensor")

    monkeypatch.setattr(folder, "read_tensor", refuse)
    found = lowbit.recommend(tiny_folder("llama"))
    assert found.given is None and "free on this machine" in str(found).replace("\n", " ")
    assert found.context == found.longest == 128 and "128 tokens" in str(found)


@pytest.mark.parametrize("speed", [False, True])
def test_more_memory_is_never_worse(speed: bool, tiny_folder: Float) -> None:
    every = lowbit.recommend(tiny_folder("llama"), PLENTY, speed=speed)
    steps = sorted({c.memory.total + d for c in every.choices for d in (-1, 0, 1)})
    found = [lowbit.recommend(tiny_folder("llama"), step, speed=speed) for step in steps]
    assert found[0].best is None and found[0].larger is not None
    assert {f.best.name for f in found if f.best} >= ({every.choices[0].name} if not speed else set())
    for less, more in pairwise(found):
        if less.best is None:
            continue
        assert more.best is not None
        if not speed:
            assert more.best.rank <= less.best.rank
        elif less.best.kl <= ACCEPTABLE.kl:
            assert more.best.kl <= ACCEPTABLE.kl and more.best.read <= less.best.read
    for one in found:
        assert all(one.fits(c) for c in (one.best, one.second) if c is not None)
        assert one.larger is None or (
            not one.fits(one.larger) and one.extra == one.larger.memory.total - one.memory > 0
        )


def test_nothing_is_offered_that_another_beats(tiny_folder: Float) -> None:
    sizes = [c.memory.weights for c in lowbit.recommend(tiny_folder("llama"), PLENTY).choices]
    losses = [c.kl for c in lowbit.recommend(tiny_folder("llama"), PLENTY).choices]
    assert sizes == sorted(sizes, reverse=True) and losses == sorted(losses)


@pytest.mark.parametrize("target", mostly_nightly(TARGETS, every=lambda i: i in (0, 1, 2)))
def test_every_recommended_command_makes_what_was_said(
    target: str, tiny_folder: Float, text: Path, tmp_path: Path
) -> None:
    found = lowbit.recommend(str(tiny_folder("llama-tied")), PLENTY, target=target, calibration=text, samples=2)
    every = found.choices if target == "lowbit" else (found.choices[0], found.choices[-1])
    for number, choice in enumerate(every):
        words = shlex.split(choice.command)
        assert words[:2] == ["lowbit", "quantize"]
        out = tmp_path / f"{number}{'.gguf' if target == 'gguf' else ''}"
        done = CliRunner().invoke(app, [*words[1:], "--no-card", "-o", str(out)])
        assert done.exit_code == 0, (choice.command, done.output)
        assert written(out) == choice.memory.weights, choice.command


def written(out: Path) -> int:
    """Bytes of the weights: of weight files and their index, or of the tensors of a GGUF file."""
    if out.is_dir():
        return sum(
            f.stat().st_size for f in out.iterdir() if f.name.endswith((".safetensors", ".safetensors.index.json"))
        )
    import gguf

    return sum(int(t.n_bytes) for t in gguf.GGUFReader(out).tensors)


def test_figures_are_those_of_the_results() -> None:
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in (*MEASURED, *MIXES):
        path = RESULTS / row.source
        if path.suffix == ".md":
            inputs = f"`{row.inputs}`" if row.inputs else "KL"
            lines = [line for line in path.read_text().splitlines() if f"`{row.recipe}`" in line and inputs in line]
            assert any(f"{row.kl:.4f}" in line or f"{row.kl:g}" in line for line in lines), row
            continue
        found = json.loads(path.read_text())
        tables[row.source] = found if isinstance(found, list) else found["rows"]
        names = {row.recipe, f"smollm2 {row.recipe}"}
        match = [r for r in tables[row.source] if {r.get("recipe"), r.get("name"), r.get("key")} & names]
        assert match and abs(match[0]["kl"] - row.kl) < 6e-6 * max(1, row.kl) + 5e-6, (row, match)


def test_a_bound_is_never_below_what_more_bits_lose() -> None:
    for fmt in ("q6_k", "q5_k", "q4_k", "int4:g64", "int3:g32", "int2:g16"):
        for looked in (True, False):
            loss = expected_of_format(fmt, "", looked)
            assert loss is None or loss.at_most == (loss.by.format != fmt)
    with_text, without = expected_of_format("int4:g32", "", True), expected_of_format("int4:g32", "", False)
    assert with_text is not None and without is not None and with_text.kl < without.kl and not with_text.at_most
    assert expected_of_format("int7:g9", "", True) is None


def test_nothing_fits_says_what_does(tiny_folder: Float) -> None:
    kv = KVCache((CacheLayer(0, 1, 250, 250),))  # 1000 bytes a token
    memory = OVERHEAD + 5_000 + 7 * 1000 + 999
    most = longest_context(memory, 5_000, kv, 100)
    assert most == 7 and running_memory(5_000, kv, 7).total <= memory < running_memory(5_000, kv, 8).total
    assert longest_context(10, 5_000, kv, 100) == 0 and longest_context(PLENTY, 5_000, kv, 100) == 100
    small = lowbit.recommend(tiny_folder("llama"), PLENTY).smallest
    short = small.memory.total - small.memory.cache // 2
    found = lowbit.recommend(tiny_folder("llama"), short)
    assert found.best is None and 0 < found.context_that_fits < found.context
    again = lowbit.recommend(tiny_folder("llama"), short, found.context_that_fits)
    assert (
        again.best is not None
        and lowbit.recommend(tiny_folder("llama"), short, found.context_that_fits + 1).best is None
    )
    done = CliRunner().invoke(app, ["recommend", str(tiny_folder("llama")), "--memory", "20MB"])
    assert done.exit_code == 2 and "Nothing fits" in done.stdout and small.name in done.stdout
    done = CliRunner().invoke(app, ["recommend", str(tiny_folder("llama")), "--memory", "20MB", "--json"])
    assert done.exit_code == 2 and json.loads(done.stdout)["best"] is None


@pytest.mark.parametrize("memory", ["20MB", "601MB", "8GB"])
def test_the_words_fit_80_columns(memory: str, tiny_folder: Float) -> None:
    found = lowbit.recommend(tiny_folder("llama"), memory)
    for line in str(found).splitlines():
        assert len(line) <= 80 or line.startswith("  lowbit ") or str(tiny_folder("llama")) in line, line
    assert memory in str(found) and "not measured on this model" in str(found).replace("\n", " ")


def test_json_has_the_answer(tiny_folder: Float) -> None:
    done = CliRunner().invoke(
        app, ["recommend", str(tiny_folder("llama")), "--memory", "8GB", "--context", "64", "--json"]
    )
    found = json.loads(done.stdout)
    chosen = next(c for c in found["choices"] if c["name"] == found["best"])
    assert done.exit_code == 0 and found["memory"] == 8 * 10**9 and found["context"] == 64
    assert chosen["fits"] and chosen["expected_kl"]["source"] in {row.source for row in MEASURED}
    assert chosen["total_bytes"] == chosen["weight_bytes"] + chosen["cache_bytes"] + chosen["working_bytes"]


def test_encoders_keep_no_cache_and_are_given_the_text_that_comes_with_lowbit(tiny_folder: Float) -> None:
    found = lowbit.recommend(tiny_folder("bert"), PLENTY)
    assert {c.memory.cache for c in found.choices} == {0} and not found.generates
    assert found.best is not None and found.best.name == "w8" and found.best.text is None
    assert {c.text for c in found.choices if c.bits < 6} == {"builtin"} and "no KV cache" in str(found)


def test_experts_that_take_no_part_are_not_read(tiny_folder: Float) -> None:
    found = lowbit.recommend(tiny_folder("mixtral"), PLENTY)
    assert found.experts == active_experts(transformers.AutoConfig.from_pretrained(tiny_folder("mixtral"))) == 0.5
    best = found.choices[0]
    plan = lowbit.plan(tiny_folder("mixtral"), best.recipe)
    experts = sum(t.bytes_after for t in plan.tensors if t.kind == "experts")
    table = next(t for t in plan.tensors if t.kind == "embedding")
    whole = sum(t.bytes_after for t in plan.tensors)
    assert best.read == int(whole - experts / 2 - table.bytes_after * (1 - 1 / table.shape[0]))
    assert "only some experts" in str(found)


def test_a_quantized_model_stays_as_it_is_where_it_fits(packed_folder: Any) -> None:
    folder = packed_folder("llama", "w4")
    found = lowbit.recommend(str(folder), PLENTY)
    assert found.best is not None and found.best.name == AS_IT_IS and found.best.command == f"lowbit chat {folder}"
    assert all(c.memory.weights < found.best.memory.weights for c in found.choices[1:])
    less = lowbit.recommend(str(folder), found.best.memory.total - 1)
    assert less.best is not None and less.best.name != AS_IT_IS and "itself quantized" in str(less).replace("\n", " ")


def test_measured_figures_decide_and_are_those_of_compare(tiny_folder: Float, text: Path) -> None:
    heard: list[str] = []
    found = lowbit.recommend(
        tiny_folder("llama"), PLENTY, measure=True, text=text, windows=2, length=32, told=heard.append
    )
    tried = [c for c in found.choices if c.measured is not None]
    assert len(tried) == 3 and found.best in tried and found.best.kl == min(c.kl for c in tried)
    rows = lowbit.compare(tiny_folder("llama"), [c.recipe for c in tried], text=text, windows=2, length=32)[1:]
    assert [r.card.quality.kl_mean.value for r in rows] == [c.measured.value for c in tried]  # type: ignore[union-attr]
    assert heard and "about" in heard[0] and "2 windows of 32 tokens" in str(found).replace("\n", " ")


def test_a_module_is_recommended_a_call(tiny_folder: Float) -> None:
    found = lowbit.recommend(transformers.AutoModelForCausalLM.from_pretrained(tiny_folder("llama")), PLENTY)
    assert found.choices[0].command == "lowbit.quantize(model, 'w8')"
    assert "calibration='builtin'" in found.choices[-1].command


def test_what_would_be_ignored_is_an_error(tiny_folder: Float, text: Path) -> None:
    model = tiny_folder("llama")
    with pytest.raises(RecipeError, match="nothing is measured"):
        lowbit.recommend(model, PLENTY, text=text)
    with pytest.raises(RecipeError, match="no calibration text"):
        lowbit.recommend(model, PLENTY, samples=3)
    with pytest.raises(RecipeError, match=r"ggfu.*gguf"):
        lowbit.recommend(model, PLENTY, target="ggfu")
    named = lowbit.recommend(tiny_folder("llama-tied"), PLENTY, target="llama.cpp")
    assert named.choices == lowbit.recommend(tiny_folder("llama-tied"), PLENTY, target="gguf").choices
    with pytest.raises(RecipeError, match="is no size"):
        lowbit.recommend(model, "much")
    with pytest.raises(LowbitError, match="BertForMaskedLM"):
        lowbit.recommend(tiny_folder("bert"), PLENTY, target="gguf")
    assert CliRunner().invoke(app, ["recommend", str(model), "--memory", "8"]).exit_code == 2
    assert CliRunner().invoke(app, ["recommend", str(model), "--windows", "3"]).exit_code == 2


def test_a_giant_from_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=128256, hidden_size=4096, intermediate_size=14336, dtype="bfloat16",
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        state = transformers.LlamaForCausalLM(config).state_dict()
    info = {n: SimpleNamespace(dtype="BF16", shape=list(t.shape)) for n, t in state.items()}
    metadata = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=info)})
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda repo: metadata)
    monkeypatch.setattr(hub, "snapshot", lambda *args, **kwargs: tmp_path)
    monkeypatch.setattr("lowbit.report.recommend.free_memory", lambda: 16 * 10**9)
    found = lowbit.recommend("meta-llama/Llama-3.1-8B", "8GB")
    assert isinstance(found, Recommendation) and found.context == 4096 and found.best is not None
    assert 5e9 < found.best.memory.weights < 7e9 and found.best.memory.cache == 4096 * 32 * 2 * 8 * 128 * 2
    assert found.best.text == "builtin"  # the text that comes with lowbit, though the float model does not fit here
    assert found.larger is not None and found.larger.name == "w8" and found.second is not None
    best, second = found.best.memory.weights, found.second.memory.weights
    assert second < best and re.search(r"does not fit: it needs .* GiB", str(found).replace("\n", " "))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "about 1 second"),
        (40, "about 40 seconds"),
        (95, "about 1.6 minutes"),
        (9000, "about 2.5 hours"),
        (5e5, "about 5.8 days"),
    ],
)
def test_times_are_said_roughly(seconds: float, said: str) -> None:
    assert about(seconds) == said


def test_a_cache_format_makes_room_and_goes_into_the_command(tiny_folder: Float, tmp_path: Path) -> None:
    folder, context = tiny_folder("llama"), 128
    plain = lowbit.recommend(folder, PLENTY, context)
    small = lowbit.recommend(folder, PLENTY, context, cache="int4:g8")
    assert plain.best is not None and small.best is not None and plain.best.name == small.best.name
    assert small.best.memory.cache < plain.best.memory.cache and small.best.memory.weights == plain.best.memory.weights
    assert f"{small.best.name},kv=int4:g8" in small.best.command and "kv=" not in plain.best.command
    assert "its KV cache stored as int4:g8" in " ".join(small.text().split())
    lowbit.quantize(folder, "int8:channel,kv=int8", tmp_path / "q", effort="none")
    as_it_is = [c for c in lowbit.recommend(tmp_path / "q", PLENTY, context).choices if c.name == "as it is"]
    assert as_it_is[0].memory.cache == lowbit.plan(folder, "int8:channel,kv=int8", context=context).kv_bytes
    with pytest.raises(lowbit.LowbitError, match="would be ignored by gguf"):
        lowbit.recommend(folder, PLENTY, target="gguf", cache="int8")
