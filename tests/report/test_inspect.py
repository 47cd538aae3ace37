"""inspect: statistics against a naive oracle, groups, and quantized folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowbit.display import as_text
from lowbit.errors import SourceError
from lowbit.interchange.opening import open_source
from lowbit.report.inspect import inspect_quantized, inspect_source, moments
from tiny import save_tiny, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_agree_with_the_definitions(dtype: torch.dtype) -> None:
    x = (torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3 + 1).to(dtype)
    exact = x.double()
    centred = exact - exact.mean()
    found = moments(x)
    assert (found.low, found.high, found.bad) == (float(exact.min()), float(exact.max()), 0)
    assert found.mean == pytest.approx(float(exact.mean()))
    assert found.std == pytest.approx(float(centred.square().mean().sqrt()))
    assert found.outlier == pytest.approx(float(exact.abs().max()) / found.std)
    assert found.kurtosis == pytest.approx(float(centred.pow(4).mean() / centred.square().mean() ** 2 - 3))


def test_moments_work_by_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(999, generator=torch.Generator().manual_seed(1))
    whole = moments(x)
    monkeypatch.setattr("lowbit.report.inspect._CHUNK", 10)
    assert moments(x).std == pytest.approx(whole.std) and moments(x).kurtosis == pytest.approx(whole.kurtosis)


def test_moments_count_what_is_not_finite() -> None:
    found = moments(torch.tensor([1.0, torch.nan, -torch.inf, 3.0]))
    assert (found.bad, found.low, found.high) == (2, 1.0, 3.0)
    assert moments(torch.tensor([torch.nan])).bad == 1
    assert moments(torch.empty(0)).bad == 0


def test_a_model_is_listed_whole() -> None:
    model = tiny_model("gpt2")
    seen: list[int] = []
    found = inspect_source(open_source(model), progress=lambda name, done, total: seen.append(done))
    assert {t.name for t in found.tensors} == {n for n, _ in model.named_parameters()}
    assert sum(t.share for t in found.tensors) == pytest.approx(1)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert seen[-1] == found.nbytes and seen == sorted(seen)
    by_name = {t.name: t for t in found.tensors}
    assert by_name["transformer.h.0.ln_1.weight"].keep == "vector"
    assert by_name["transformer.h.0.attn.c_attn.weight"].kind == "conv1d"
    assert found.tied == {"lm_head.weight": "transformer.wte.weight"}
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_quantized_folder_shows_its_formats(tmp_path: Path) -> None:
    import lowbit

    save_tiny("llama", tmp_path / "float")
    made = lowbit.quantize(tmp_path / "float", "int4:g32", tmp_path / "small")
    found = inspect_quantized(tmp_path / "small")
    planned = {t.name: t for t in made.plan.tensors}
    assert {t.name for t in found.tensors} == set(planned)
    for t in found.tensors:
        expected = planned[t.name]
        assert t.nbytes == expected.bytes_after
        assert t.format == (None if expected.format is None else str(expected.format))
        if t.format is not None:
            assert t.bits == pytest.approx(8 * expected.bytes_after / expected.count)
    assert found.quantized == str(made.plan.recipe)


def test_a_folder_of_another_method_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "lowbit"}}))
    with pytest.raises(SourceError, match="quantization_config.tensors is missing"):
        inspect_quantized(tmp_path)


def test_the_numbers_of_a_row_are_those_of_one_tensor() -> None:
    found = inspect_source(open_source(tiny_model("llama")))
    lines = as_text(found, 1000).splitlines()
    heads = next(line for line in lines if "max/std" in line).split()
    assert heads[-7:-2] == ["min", "max", "std", "max/std", "kurtosis"]
    rows = {line.split()[0]: line for line in lines if ".{0-1}." in line}
    assert rows
    for name, line in rows.items():
        ends = name.partition("{0-1}")[2]
        group = [t.moments for t in found.tensors if t.name.endswith(ends) and t.moments is not None]
        most = max(group, key=lambda m: m.outlier)
        numbers = (most.low, most.high, most.std, most.outlier, most.kurtosis)
        assert " ".join(f"{value:.3g}" for value in numbers) in " ".join(line.split())
    text = " ".join(lines)
    assert "the numbers of the one with the largest max/std" in text and "0 for a normal distribution" in text


def test_a_source_that_is_quantized_itself_is_said_to_be() -> None:
    found = replace(
        inspect_source(open_source(tiny_model("llama"))), storage="gguf, Q4_1 and Q8_0", source_bytes=94 << 20
    )
    assert "stored as gguf, Q4_1 and Q8_0, 94 MiB; types and sizes here are of its float values" in as_text(found, 200)
    assert "stored as float," not in as_text(inspect_source(open_source(tiny_model("llama"))), 200)
