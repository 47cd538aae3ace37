"""What cards, inspect and the README of a folder say of its KV cache."""

from __future__ import annotations

from pathlib import Path

import lowbit
from lowbit.display import as_text
from lowbit.kv import CacheFormat
from lowbit.kv.folder import write_cache_format
from lowbit.measure.card import Card
from lowbit.measure.subject import folder_parts, plan_parts
from lowbit.report import card as cards
from lowbit.report.panel import card_lines
from tiny import save_tiny

TEXT = [" ".join(["the cat sat on a mat and a hen ran"] * 60)]


def test_the_card_counts_the_cache_at_the_models_longest_context(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m")
    plain = lowbit.quantize(tmp_path / "m", "int8:channel", tmp_path / "plain")
    assert plan_parts(plain.plan).cache is None and folder_parts(tmp_path / "plain").cache is None
    made = lowbit.quantize(tmp_path / "m", "int8:channel,kv=int4:g8", tmp_path / "q", effort="none")
    found = folder_parts(tmp_path / "q").cache
    assert found is not None and found == plan_parts(made.plan).cache
    at_most = lowbit.plan(tmp_path / "m", "int8:channel,kv=int4:g8", context=found.context)
    assert (found.bytes, found.per_token, found.exact) == (
        at_most.kv_bytes,
        at_most.kv_bytes_per_token,
        at_most.kv_bytes_before,
    )
    said = dict(card_lines(Card(folder_parts(tmp_path / "q"))))
    assert said["KV cache"] == "int4:g8" and f"at {found.context:,} tokens" in said["  takes"]
    shown = " ".join(as_text(lowbit.inspect(tmp_path / "q"), 80).split())
    assert "KV cache int4:g8; " in shown and "KV cache" not in as_text(lowbit.inspect(tmp_path / "plain"), 80)


def test_card_and_readme_follow_a_format_that_is_written_later(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "m")
    made = lowbit.quantize(tmp_path / "m", "int8:channel,kv=int8", tmp_path / "q", effort="none")
    lowbit.save_card(lowbit.evaluate(made, tmp_path / "m", TEXT, windows=1, length=32), tmp_path / "q")
    assert "| KV cache | int8 |" in " ".join((tmp_path / "q" / "README.md").read_text().split())
    before = lowbit.card(tmp_path / "q")
    write_cache_format(tmp_path / "q", CacheFormat.of("k=int8,v=int4:g8"))
    assert cards.keep_cache(tmp_path / "q") == ()
    after = lowbit.card(tmp_path / "q")
    assert after.parts.cache is not None and after.parts.cache.format == "k=int8,v=int4:g8"
    assert after.quality == before.quality
    assert "k=int8,v=int4:g8" in (tmp_path / "q" / "README.md").read_text()
    write_cache_format(tmp_path / "q", None)
    cards.keep_cache(tmp_path / "q")
    assert "KV cache" not in (tmp_path / "q" / "README.md").read_text()
    (tmp_path / "q" / "README.md").write_text("mine\n")
    write_cache_format(tmp_path / "q", CacheFormat.of("int8"))
    assert "stays as it is" in cards.keep_cache(tmp_path / "q")[0]
