"""Calibration finds what is best for the text, and its tables come back from a file, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbit.errors import LowbitError, SourceError
from lowbit.kv import CacheFormat, Tables, calibrate, round_trip, tables_from_tensors, tables_to_tensors
from lowbit.kv.learning import Observed, learn_tables
from lowbit.kv.recording import record
from lowbit.kv.side import parse_side
from strategies import steady
from tiny import VOCAB, tiny_model

FORMATS = [
    "kvquant3", "int4:*x1", "uint4:*x1:min=fp16", "uint4:*x1:zero=fp16", "search@int4:*x1", "rotate@kmeans3:*x1:cb=tensor",
    "kmeans2:g4:cb=tensor:outliers=2", "int8:tensor", "k=int8,v=mse@kmeans3:cb=tensor", "int4:outliers=1", "kmeans4:*x2:cb=tensor",
]  # fmt: skip


def windows(count: int = 3, tokens: int = 48) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (tokens,), generator=generator) for _ in range(count)]


def error(x: Tensor, y: Tensor, weight: Tensor | None = None) -> float:
    v = torch.ones_like(x) if weight is None else weight
    return float((v * (x - y).square()).sum() / (v * x.square()).sum())


@pytest.mark.parametrize("text", FORMATS)
def test_tables_come_back_and_serve(text: str) -> None:
    model, format = tiny_model("llama"), CacheFormat.of(text)
    before = {name: t.clone() for name, t in model.named_parameters()}
    tables = calibrate(model, windows(), format)
    assert all(torch.equal(t, before[name]) and t.grad is None for name, t in model.named_parameters())
    tensors = tables_to_tensors(tables)
    back = tables_from_tensors(tensors, format, 2, 2, 8)
    assert tables_to_tensors(back).keys() == tensors.keys() and back.keys() == tables.keys()
    again = tables_to_tensors(calibrate(model, windows(), format))
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    seen = record(model, windows(), lambda layer, which: format.side(layer, which), False)  # type: ignore[arg-type]
    for (layer, which), (side, parts) in seen.items():
        x = Observed.joined(parts).x
        assert error(x, round_trip(x, side, back.get((layer, which)))) < (0.12 if "2" in text else 0.05)


def test_gradients_are_those_of_the_loss() -> None:
    """Against differences of the loss when the keys of a layer are moved along it."""
    model, text = tiny_model("llama").double(), windows(1, 12)
    side = parse_side("kmeans3:cb=tensor")
    (seen,) = [parts for key, (_, parts) in record(model, text, lambda *_: side, True).items() if key == (0, "k")]
    gradient = seen[0].gradient
    assert gradient is not None and gradient.shape == (1, 2, 12, 8)

    def loss(moved: float) -> float:
        from transformers import DynamicCache

        class Moved(DynamicCache):
            def update(self, k: Tensor, v: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
                return (k + moved * gradient / gradient.norm() if layer == 0 else k), v

        with torch.no_grad():
            logits = model(input_ids=text[0][None], cache=Moved(config=model.config), use_cache=True).logits
        return float(torch.nn.functional.cross_entropy(logits[0, :-1], text[0][1:], reduction="sum"))

    slope = (loss(0.05) - loss(-0.05)) / 0.1
    assert float(gradient.norm()) == pytest.approx(slope, rel=1e-2)


def test_learned_levels_beat_fixed_ones() -> None:
    """Of numbers that are far from uniform, by the weights that count."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 600, 16, generator=generator).pow(3)
    gradient = torch.randn(2, 600, 16, generator=generator) * (x.abs() < 1)
    for learned, fixed in (("kmeans3:*x1:cb=tensor", "search@int3:*x1"), ("kmeans3:cb=tensor", "search@int3")):
        tables = learn_tables(parse_side(learned), Observed(x))
        other = learn_tables(parse_side(fixed), Observed(x)) if "*x1" in fixed else None
        plain = error(x, round_trip(x, parse_side(learned), tables))
        assert plain < 0.9 * error(x, round_trip(x, parse_side(fixed), other))
        weighed = learn_tables(parse_side(learned), Observed(x, gradient))
        v = gradient.square()
        assert error(x, round_trip(x, parse_side(learned), weighed), v) < 0.8 * error(
            x, round_trip(x, parse_side(learned), tables), v
        )


def test_levels_are_near_the_best_for_a_channel() -> None:
    """One channel of 8 values: every one a level, but for the rounding to whole numbers."""
    values = torch.tensor([-3.0, -2.0, -1.2, -0.3, 0.4, 1.0, 2.2, 3.5])
    x = values[torch.randint(0, 8, (1, 400, 1), generator=torch.Generator().manual_seed(1))]
    side = parse_side("kmeans3:*x1:cb=tensor")
    assert error(x, round_trip(x, side, learn_tables(side, Observed(x)))) < 2e-5


def test_outliers_are_the_largest_channels() -> None:
    x = torch.randn(2, 100, 8, generator=torch.Generator().manual_seed(0))
    x[0, :, 6] += 30
    x[1, :, 1] *= 30
    found = learn_tables(parse_side("int4:outliers=1"), Observed(x)).channels
    assert found is not None and found.tolist() == [[6], [1]]


@pytest.fixture(scope="module")
def good() -> tuple[CacheFormat, dict[str, Tensor]]:
    format = CacheFormat.of("kvquant3")
    return format, tables_to_tensors(calibrate(tiny_model("llama"), windows(1), format))


def _is(value: Tensor, **changes: Any) -> Tensor:
    out = value.clone()
    out.view(-1)[changes["at"]] = changes["to"]
    return out


DAMAGE: dict[str, Any] = {
    "another type": lambda t: {"layers.0.k.scale": t["layers.0.k.scale"].half()},
    "another shape": lambda t: {"layers.0.k.scale": t["layers.0.k.scale"][:1]},
    "not finite": lambda t: {"layers.1.k.offset": _is(t["layers.1.k.offset"], at=3, to=float("nan"))},
    "a level out of range": lambda t: {"layers.0.v.levels": _is(t["layers.0.v.levels"], at=-1, to=128.0)},
    "no whole number": lambda t: {"layers.0.v.levels": t["layers.0.v.levels"] * 0.75},
    "not in order": lambda t: {"layers.0.v.levels": t["layers.0.v.levels"].flip(0)},
    "all on one side": lambda t: {"layers.0.v.levels": torch.arange(1.0, 9.0)},
    "no such channel": lambda t: {"layers.0.v.channels": _is(t["layers.0.v.channels"], at=0, to=8)},
    "a negative channel": lambda t: {"layers.0.v.channels": _is(t["layers.0.v.channels"], at=0, to=-1)},
    "no such layer": lambda t: {"layers.2.v.levels": t["layers.0.v.levels"]},
    "a strange name": lambda t: {"layers.00.v.levels": t["layers.0.v.levels"]},
    "no such field": lambda t: {"layers.0.v.scale": t["layers.0.k.scale"]},
    "missing": lambda t: {"layers.0.k.scale": None},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tables_are_refused_in_words(damage: str, good: tuple[CacheFormat, dict[str, Tensor]]) -> None:
    format, tensors = good
    changed = {k: v for k, v in (tensors | DAMAGE[damage](tensors)).items() if v is not None}
    with pytest.raises(SourceError, match="KV cache"):
        tables_from_tensors(changed, format, 2, 2, 8)


@steady(60)
@given(st.data())
def test_any_tensors_are_tables_or_an_error(data: st.DataObject) -> None:
    names = st.from_regex(r"layers\.[0-3]\.[kv]\.(levels|scale|offset|channels)", fullmatch=True)
    tensors = st.sampled_from([
        torch.zeros(8), torch.ones(2, 8), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(0), torch.tensor(1.0),
        torch.arange(-4.0, 4.0), torch.zeros(2, 8, dtype=torch.bool), torch.zeros(8, dtype=torch.complex64),
    ])  # fmt: skip
    given = data.draw(st.dictionaries(names, tensors, max_size=6))
    for text in ("kvquant3", "int8", "int4:outliers=1", "k=int4:*x1,v=int8"):
        try:
            found = tables_from_tensors(given, CacheFormat.of(text), 2, 2, 8)
        except SourceError:
            continue
        assert all(isinstance(tables, Tables) for tables in found.values())


def test_what_cannot_be_calibrated_is_said() -> None:
    with pytest.raises(LowbitError, match="there is none"):
        calibrate(tiny_model("llama"), [], CacheFormat.of("kvquant3"))
    with pytest.raises(LowbitError, match="encoder-decoders"):
        calibrate(tiny_model("t5"), windows(1), CacheFormat.of("kvquant3"))
    assert calibrate(tiny_model("llama"), [], CacheFormat.of("int8")) == {}
