"""The cache format that a folder carries: written, read back, copied, damaged, and at work in transformers and in the engine."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.engine.engine import Engine
from lowbit.engine.folder_cache import cache_format_of, sizes_of
from lowbit.errors import LowbitError, RecipeError, SourceError
from lowbit.kv import CacheFormat, Tables
from lowbit.kv.folder import read_cache_format, read_cache_tables, write_cache_format
from lowbit.kv.quantized_cache import QuantizedCache
from lowbit.planning.kv_cache import kv_cache
from tiny import save_tiny

LEARNED = "k=kmeans3:*x1:cb=tensor:sinks=1,v=kmeans3:cb=tensor:sinks=1"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache") / "m"
    save_tiny("llama", root)
    return root


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    lowbit.quantize(source, "int8:channel,kv=int8", tmp_path / "q", effort="none")
    return tmp_path / "q"


def seen(model: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """The caches that the model's forward was given while it generated."""
    caches: list[Any] = []
    forward = type(model).forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        caches.append(kwargs.get("cache", kwargs.get("past_key_values")))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    model.generate(torch.arange(3, 12)[None], max_new_tokens=3, do_sample=False, **options)
    monkeypatch.undo()
    return caches


def test_quantize_writes_it_and_nothing_where_nothing_is_said(source: Path, folder: Path, tmp_path: Path) -> None:
    assert read_cache_format(folder) == CacheFormat.of("int8")
    assert json.loads((folder / "lowbit.json").read_text())["quantization"]["kv"] == "int8"
    lowbit.quantize(source, "int8:channel", tmp_path / "plain")
    plain, said = ((tmp_path / "plain" / name).read_text() for name in ("config.json", "lowbit.json"))
    assert read_cache_format(tmp_path / "plain") is None and '"kv"' not in plain + said
    weights = [(place / "model.safetensors").read_bytes() for place in (folder, tmp_path / "plain")]
    assert weights[0] == weights[1]  # the cache changes no weight
    assert read_cache_format(source) is None


def test_the_same_command_knows_the_folder_whatever_was_written_since(source: Path, folder: Path) -> None:
    write_cache_format(folder, CacheFormat.of("k=int8,v=int4:g8"))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    lowbit.quantize(source, "int8:channel,kv=int8", folder, effort="none")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert str(read_cache_format(folder)) == "k=int8,v=int4:g8"


def test_it_is_written_into_an_older_folder_and_taken_out_again(source: Path, tmp_path: Path) -> None:
    lowbit.quantize(source, "int8:channel", tmp_path / "q")
    before = {file.name: file.read_bytes() for file in (tmp_path / "q").iterdir()}
    write_cache_format(tmp_path / "q", CacheFormat.of("kv=int4:g8,k:0=int8"))
    assert str(read_cache_format(tmp_path / "q")) == "kv=int4:g8,k:0=int8"
    write_cache_format(tmp_path / "q", None)
    assert {file.name: file.read_bytes() for file in (tmp_path / "q").iterdir()} == before
    with pytest.raises(SourceError, match="not written by lowbit"):
        write_cache_format(source, CacheFormat.of("int8"))


def tables_of(folder: Path, cache: CacheFormat) -> dict[tuple[int, str], Tables]:
    sizes = sizes_of(kv_cache(transformers.AutoConfig.from_pretrained(folder)))
    found = {}
    for layer, (heads, keys, _) in sizes.items():
        levels = torch.tensor([-127.0, -60, -25, -5, 5, 25, 60, 127])
        found[layer, "k"] = Tables(
            levels=levels, scale=torch.full((heads, keys), 0.01), offset=torch.zeros(heads, keys)
        )
        found[layer, "v"] = Tables(levels=levels)
    return found


def test_calibrated_tables_are_kept_beside_the_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CacheFormat.of(LEARNED)
    with pytest.raises(RecipeError, match="tables"):
        write_cache_format(folder, cache)
    tables = tables_of(folder, cache)
    write_cache_format(folder, cache, tables)
    shutil.copytree(folder, tmp_path / "copy")
    sizes = sizes_of(kv_cache(transformers.AutoConfig.from_pretrained(folder)))
    again = read_cache_tables(tmp_path / "copy", cache, sizes)
    assert again.keys() == tables.keys()
    for place, found in again.items():
        for name, value in found.parts().items():
            assert torch.equal(value, tables[place].parts()[name])
    model: Any = lowbit.load(tmp_path / "copy")
    (cache_seen,) = {id(c): c for c in seen(model, monkeypatch)}.values()
    assert isinstance(cache_seen, QuantizedCache) and str(cache_seen.format) == str(cache)
    write_cache_format(folder, CacheFormat.of("int8"))
    assert not (folder / "kv_cache.safetensors").exists()
    (tmp_path / "copy" / "kv_cache.safetensors").unlink()
    with pytest.raises(SourceError, match="kv_cache.safetensors is not there"):
        lowbit.load(tmp_path / "copy")


@pytest.mark.parametrize(
    "said", ["int9", "k=int8", "kv=int8,kv=int8", "int8:recent=99999999", "rotate@", "\0", "x" * 70_000, 3, ["int8"]]
)
def test_what_is_no_format_is_refused_by_name(said: Any, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv"] = said
    (folder / "config.json").write_text(json.dumps(config))
    for door in (read_cache_format, lowbit.load, Engine.open, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(LowbitError, match=r"quantization_config\.kv"):
            door(folder)


def test_damaged_tables_are_refused(folder: Path) -> None:
    cache = CacheFormat.of(LEARNED)
    tables = tables_of(folder, cache)
    write_cache_format(folder, cache, tables)
    whole = (folder / "kv_cache.safetensors").read_bytes()
    for damage in (
        whole[:40],
        whole[:-8],
        b"",
        whole.replace(b"layers.0", b"layers.9"),
        whole.replace(b".levels", b".strays"),
    ):
        (folder / "kv_cache.safetensors").write_bytes(damage)
        with pytest.raises(SourceError):
            lowbit.load(folder)


def test_generate_of_transformers_uses_it_unless_told_otherwise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in (lowbit.load(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)):
        assert cache_format_of(model) == CacheFormat.of("int8")
        caches = seen(model, monkeypatch)
        assert all(isinstance(c, QuantizedCache) for c in caches) and str(caches[0].format) == "int8"
        own = transformers.DynamicCache(config=model.config)
        assert all(c is own for c in seen(model, monkeypatch, past_key_values=own))
        assert {type(c).__name__ for c in seen(model, monkeypatch, cache_implementation="dynamic")} == {"DynamicCache"}
        assert set(seen(model, monkeypatch, use_cache=False)) <= {None}
        twin = copy.deepcopy(model)
        assert all(isinstance(c, QuantizedCache) for c in seen(twin, monkeypatch))
        beams = seen(model, monkeypatch, num_beams=2)
        assert all(isinstance(c, QuantizedCache) for c in beams)
    dense = lowbit.dequantize(lowbit.load(folder))
    assert all(isinstance(c, QuantizedCache) for c in seen(dense, monkeypatch))


def test_a_model_in_memory_has_it_and_saves_it(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = transformers.AutoModelForCausalLM.from_pretrained(source)
    made = lowbit.quantize(module, "int8:channel,kv=int4:g8", effort="none")
    assert all(isinstance(c, QuantizedCache) for c in seen(made.model, monkeypatch))
    made.save(tmp_path / "saved")
    assert str(read_cache_format(tmp_path / "saved")) == "int4:g8"
    made.model.save_pretrained(tmp_path / "theirs")
    assert str(read_cache_format(tmp_path / "theirs")) == "int4:g8"


def test_an_encoder_decoder_stores_both_of_its_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, vocab_size=64, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"],
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    lowbit.quantize(tmp_path / "t5", "int8:channel,kv=int8", tmp_path / "q", effort="none")
    caches = [c for c in seen(lowbit.load(tmp_path / "q"), monkeypatch) if c is not None]
    assert caches
    for cache in caches:
        assert isinstance(cache.self_attention_cache, QuantizedCache)
        assert isinstance(cache.cross_attention_cache, QuantizedCache)


def test_the_engine_takes_it_and_another_one_where_it_is_given(float_folder: Any, tmp_path: Path) -> None:
    source, folder = float_folder("llama"), tmp_path / "wide"
    lowbit.quantize(source, "int8:channel,kv=int8", folder, effort="none")
    assert str(Engine.open(folder).describe().cache) == "int8"
    assert str(Engine.open(folder, cache="int16").describe().cache) == "int16"
    assert str(Engine.open(source).describe().cache) == "int16"
    assert str(Engine.open(lowbit.load(folder)).describe().cache) == "int8"


def test_the_plan_s_bytes_are_those_of_the_cache_that_is_filled(source: Path, tmp_path: Path) -> None:
    for text in (
        "int8",
        "int4:g8",
        "rotate@int4",
        "int8:outliers=2",
        "k=int8:sinks=2,v=int4:g8:recent=3",
        "kv=int4,k:0=int8,v:1=int16",
    ):
        # What is kept exactly takes the 16 bits of the plan where the model computes in 16.
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        cache = QuantizedCache(text, model)
        with torch.no_grad():
            for i in range(21):
                model(torch.tensor([[3 + i]]), past_key_values=cache, use_cache=True)
        assert cache.nbytes == kv_cache(model.config).stored(CacheFormat.of(text)).bytes_at(21), text


@pytest.mark.parametrize("text", ["int8", "int4:g16", "k=int8,v=int4:g16", "turboquant4", "kv=int8,v:0=int4:g16"])
def test_bytes_of_a_token_in_the_engine_are_the_plan_s(text: str, float_folder: Any) -> None:
    folder = float_folder("llama")
    planned = kv_cache(transformers.AutoConfig.from_pretrained(folder)).stored(CacheFormat.of(text))
    assert Engine.open(folder, threads=1, cache=text).describe().cache_bytes_per_token == planned.bytes_per_token
