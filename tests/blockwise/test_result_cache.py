"""Results that the passes of a block have in common."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowbit.blockwise import result_cache
from lowbit.blockwise.hidden_states import TensorFile
from lowbit.blockwise.result_cache import ResultCache


class Model:
    """Three products one after another, of which it counts those that were computed."""

    def __init__(self, cache: ResultCache) -> None:
        self.cache, self.computed = cache, 0

    def forward(self, batch: int, x: float, costly: bool = False) -> Tensor:
        self.cache.begin(batch)
        out = torch.full((2, 3), x)
        for name in "abc":
            self.cache.depends_on(name)
            out = self.cache.result(lambda of=out: self.product(of), costly)
            out += 1  # a result in memory would change with it
        return out

    def product(self, x: Tensor) -> Tensor:
        self.computed += 1
        return 2 * x


def test_what_depends_on_final_weights_is_computed_once(tmp_path: Path) -> None:
    model = Model(ResultCache(tmp_path))
    right = [model.forward(batch, x) for batch, x in enumerate((1.0, 5.0))]
    assert model.computed == 6
    for final, fewer in (({"b"}, 0), ({"a"}, 0), (set(), 2), ({"c"}, 2), (set(), 3)):
        model.cache.final |= final
        for batch, x in enumerate((1.0, 5.0)):
            model.computed = 0
            assert torch.equal(model.forward(batch, x), right[batch])
            assert model.computed == 3 - fewer
    model.cache.forget()
    assert torch.equal(model.forward(0, 7.0), torch.full((2, 3), 63.0))
    model.cache.remove()
    assert not any(tmp_path.iterdir())


def test_products_beyond_the_limit_are_computed_again_and_attention_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_cache, "_FILE_BYTES", 2 * 2 * 3 * 4)
    for costly, computed in ((False, 1), (True, 0)):
        model = Model(ResultCache(tmp_path))
        model.cache.final |= set("abc")
        right = model.forward(0, 1.0, costly)
        model.computed = 0
        assert torch.equal(model.forward(0, 1.0, costly), right)
        assert model.computed == computed


def test_a_full_disk_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: TensorFile, x: Tensor) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorFile, "append", full)
    model = Model(ResultCache(tmp_path))
    model.cache.final |= set("abc")
    assert torch.equal(model.forward(0, 1.0), model.forward(0, 1.0))
    assert model.computed == 6
