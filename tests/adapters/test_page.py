"""The page on adapters, run from top to bottom on a tiny model that stands where the demo model would."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lowbit
from handmade_adapters import factors, write
from tiny import TINY, save_tiny

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
WINDOWS = {"windows=4)": 'windows=1, length=64, text="my-text.txt")'}


@pytest.mark.filterwarnings("ignore")
def test_the_page_on_adapters_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wide(make: Callable[[], Any] = TINY["llama"]) -> Any:
        config = make()
        config.hidden_size, config.head_dim, config.max_position_embeddings = 64, 16, 1024
        return config

    monkeypatch.setitem(TINY, "llama", wide)
    save_tiny("llama", tmp_path / "smollm2")
    lowbit.quantize(tmp_path / "smollm2", "int4:g32", tmp_path / "smollm2-w4")
    modules = {f"model.layers.{i}.self_attn.q_proj": (64, 64) for i in range(2)}
    for seed, name in enumerate(("my-adapter", "my-other-adapter")):
        write(tmp_path / name, factors(modules, seed=seed))
    (tmp_path / "my-text.txt").write_text("The cat sat on the mat and looked at the moon. " * 400)
    monkeypatch.chdir(tmp_path)
    known: dict[str, object] = {}
    ran = 0
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    ):
        if "from peft" in block:
            pytest.importorskip("peft")
        for name, tiny in WINDOWS.items():
            block = block.replace(name, tiny)
        exec(compile(block, f"docs/adapters.md, block {number + 1}", "exec"), known)
        ran += 1
    assert ran == 3
