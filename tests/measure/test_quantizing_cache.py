"""What a recipe leaves open of the cache is found on the result: kv=auto by a check of it, tables on text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.engine.folder_cache import cache_format_of, cache_tables_of
from lowbit.errors import LowbitError
from lowbit.kv import CacheFormat
from lowbit.kv.folder import read_cache_format
from lowbit.measure import quantizing
from tiny import save_tiny


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, float]]:
    """`choose_cache` answers at once; what it was asked."""
    import lowbit.measure.kv.check as check

    asked: list[tuple[Any, float]] = []

    def choose(model: Any, text: Any = None, kl: float = 0.0, **how: Any) -> tuple[CacheFormat, None]:
        asked.append((model, kl))
        how["progress"](1, 2)
        return CacheFormat.of("k=int8,v=int4:g8"), None

    monkeypatch.setattr(check, "choose_cache", choose)
    return asked


def test_auto_is_chosen_once_and_written(source: Path, tmp_path: Path, chosen: list[Any]) -> None:
    seen: list[str] = []
    out = tmp_path / "q"
    for _ in range(2):
        made = lowbit.quantize(
            source,
            "int8:channel,kv=auto(kl=0.03)",
            out,
            effort="none",
            progress=lambda name, done, total: seen.append(name),
        )
        assert str(made.cache) == "k=int8,v=int4:g8" and made.plan.kv_bytes < made.plan.kv_bytes_before
    assert chosen == [(str(out), 0.03)]  # the second run finds it
    assert quantizing.CHECKING in seen and str(read_cache_format(out)) == "k=int8,v=int4:g8"
    plain = lowbit.quantize(source, "int8:channel", tmp_path / "plain")
    assert plain.folder is not None
    assert (plain.folder / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_auto_of_a_model_in_memory(source: Path, tmp_path: Path, chosen: list[Any]) -> None:
    module = transformers.AutoModelForCausalLM.from_pretrained(source)
    made = lowbit.quantize(module, "int8:channel,kv=auto", effort="none")
    assert str(cache_format_of(made.model)) == "k=int8,v=int4:g8"
    made.save(tmp_path / "saved")
    assert str(read_cache_format(tmp_path / "saved")) == "k=int8,v=int4:g8"


def test_a_check_that_fails_leaves_the_result_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lowbit.measure.kv.check as check

    def fails(*_: Any, **__: Any) -> Any:
        raise LowbitError("too little text")

    monkeypatch.setattr(check, "choose_cache", fails)
    with pytest.raises(LowbitError) as caught:
        lowbit.quantize(source, "int8:channel,kv=auto", tmp_path / "q", effort="none")
    assert "check-kv" in caught.value.__notes__[0] and read_cache_format(tmp_path / "q") is None
    assert lowbit.load(tmp_path / "q")


@pytest.mark.parametrize("in_memory", [False, True])
def test_tables_are_found_and_kept(source: Path, tmp_path: Path, in_memory: bool) -> None:

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source) if in_memory else source

    words = transformers.AutoTokenizer.from_pretrained(source)
    made = lowbit.quantize(
        model, "int8:channel,kv=kvquant3", None if in_memory else tmp_path / "q", tokenizer=words, effort="none"
    )
    place = made.save(tmp_path / "q")
    loaded = lowbit.load(place)
    assert str(cache_format_of(loaded)) == str(CacheFormat.of("kvquant3")) == str(read_cache_format(place))
    found = cache_tables_of(loaded)
    assert {which for _, which in found} == {"k", "v"} and all(t.levels is not None for t in found.values())
    answer: Any = loaded
    assert answer.generate(torch.arange(3, 9)[None], max_new_tokens=3, do_sample=False).shape[-1] > 6
