"""What an export says of the cache format that its folder carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lowbit
from lowbit.convert.cache_handover import nearest_options, side_bits
from lowbit.errors import RecipeError
from lowbit.interchange.exporters.common.cache_types import LLAMA_CPP, VLLM
from lowbit.kv import CacheFormat
from lowbit.kv.folder import write_cache_format
from lowbit.planning.kv_cache import CacheLayer, KVCache
from tiny import save_tiny

KV = KVCache(tuple(CacheLayer(i, 3, 64, 64) for i in range(4)))


@pytest.mark.parametrize(
    ("cache", "llama_cpp", "vllm"),
    [
        ("int8", "-ctk q8_0 -ctv q8_0 -fa on", "--kv-cache-dtype int8_per_token_head"),
        ("int4:g32", "-ctk q4_0 -ctv q4_0 -fa on", "--kv-cache-dtype int4_per_token_head"),
        ("k=int8,v=int4:g32", "-ctk q8_0 -ctv q4_0 -fa on", "--kv-cache-dtype int8_per_token_head"),
        ("int5:g32", "-ctk q5_0 -ctv q5_0 -fa on", "--kv-cache-dtype int8_per_token_head"),
        ("k=int16,v=int8", "-ctk f16 -ctv q8_0 -fa on", "--kv-cache-dtype auto"),
        ("kivi2", "-ctk q4_0 -ctv q4_0 -fa on", "--kv-cache-dtype int4_per_token_head"),
    ],
)
def test_the_closest_types_of_other_programs(cache: str, llama_cpp: str, vllm: str) -> None:
    form = CacheFormat.of(cache)
    assert nearest_options(LLAMA_CPP, form, KV).startswith(f"`{llama_cpp}`")
    assert nearest_options(VLLM, form, KV).startswith(f"`{vllm}`")


def test_bits_of_a_number_count_scales_and_layers() -> None:
    assert side_bits(CacheFormat.of("int8"), KV, "k") == 8 + 16 / 64
    assert side_bits(CacheFormat.of("kv=int4:g32,k:0=int16"), KV, "k") == (3 * 4.5 + 16) / 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "m")
    lowbit.quantize(tmp_path / "m", "int8:g32,kv=int8", tmp_path / "q", effort="none")
    return tmp_path / "q"


@pytest.mark.parametrize("target", ["vllm", "gptq"])
def test_an_export_says_what_comes_closest_and_carries_nothing_of_it(folder: Path, tmp_path: Path, target: str) -> None:
    write_cache_format(folder, CacheFormat.of("k=int8,v=int4:g8"))
    made: Any = lowbit.export(folder, target, tmp_path / "out")
    (note,) = (note for note in made.notes if "k=int8,v=int4:g8" in note)
    assert "is not in the export" in note and "--kv-cache-dtype int8_per_token_head" in note
    assert '"kv"' not in (tmp_path / "out" / "config.json").read_text()
    write_cache_format(folder, None)
    again: Any = lowbit.export(folder, target, tmp_path / "again")
    assert not any("kv" in note for note in again.notes)


@pytest.mark.parametrize("cache", ["auto", "kvquant3"])
def test_what_is_found_for_lowbit_s_own_folder_is_refused_with_as(folder: Path, tmp_path: Path, cache: str) -> None:
    with pytest.raises(RecipeError, match="quantize without --as first"):
        lowbit.quantize_as(tmp_path / "m", f"int8:g32,kv={cache}", "vllm", tmp_path / "out")
