"""How a scale is kept: rounding up, keeping tiny values, refusing what does not fit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.formats import stores
from strategies import steady

FLOATS = ("fp32", "fp16", "bf16", "e4m3")
positive = st.floats(2.0**-126, 2.0**126, width=32)


@steady(200)
@given(st.lists(positive, min_size=1, max_size=20))
def test_e8m0_is_the_next_power_of_two_up(values):
    kept = stores.to_store(torch.tensor(values), "e8m0")
    assert kept.dtype == torch.uint8
    for value, code, back in zip(values, kept.tolist(), stores.from_store(kept, "e8m0").tolist(), strict=True):
        assert back == 2.0 ** (code - 127) >= value > back / 2


def test_e8m0_ends():
    values = torch.tensor([0.0, -1.0, 1e-45, 2.0**-127, 2.0**-126, 1.0, 2.0**127, 3e38])
    assert stores.to_store(values, "e8m0").tolist() == [0, 0, 0, 0, 1, 127, 254, 254]
    assert stores.from_store(torch.tensor([0, 254], dtype=torch.uint8), "e8m0").tolist() == [2.0**-127, 2.0**127]


@pytest.mark.parametrize("name", FLOATS)
@steady(100)
@given(st.lists(st.floats(-400, 400, width=32), min_size=1, max_size=20))
def test_float_stores_round_to_nearest_and_never_vanish(name, values):
    x = torch.tensor(values)
    kept = stores.to_store(x, name)
    back = stores.from_store(kept, name)
    assert kept.dtype == stores.stored_dtype(name) and kept.element_size() == stores.store_bytes(name)
    assert torch.equal(back, stores.rounded(x, name))
    assert torch.equal(stores.rounded(back, name), back)
    assert torch.equal(back == 0, x == 0)
    half = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8, "e4m3": 2.0**-4}[name]
    tiny = {"fp32": 0.0, "fp16": 2.0**-24, "bf16": 2.0**-133, "e4m3": 2.0**-9}[name]
    assert bool(((back - x).abs() <= (half * x.abs()).clamp_min(tiny)).all())
    assert bool((back.sign() == x.sign()).all())


@pytest.mark.parametrize(("name", "tiny"), [("fp16", 2.0**-24), ("bf16", 2.0**-133), ("e4m3", 2.0**-9)])
def test_what_would_vanish_keeps_the_smallest_magnitude(name, tiny):
    x = torch.tensor([tiny / 1000, -tiny / 1000, tiny / 2, 0.0])
    assert stores.rounded(x, name).tolist() == [tiny, -tiny, tiny, 0]


@pytest.mark.parametrize(("name", "largest"), [("fp16", 65504.0), ("bf16", 3.38953139e38), ("e4m3", 448.0)])
def test_what_would_overflow_is_an_error(name, largest):
    kept = stores.rounded(torch.tensor([largest, -largest]), name)
    torch.testing.assert_close(kept, torch.tensor([largest, -largest]))
    with pytest.raises(FormatError, match=f"does not fit {name}"):
        stores.to_store(torch.tensor([1.0, -largest * 1.004]), name)


def test_infinity_is_an_error_in_every_float_store():
    for name in FLOATS:
        with pytest.raises(FormatError, match="does not fit"):
            stores.to_store(torch.tensor([math.inf]), name)


def test_zero_points_round_to_the_even_integer():
    kept = stores.to_store(torch.tensor([0.5, 1.5, -2.5, -52.4, 3e10, -3e10]), "int32")
    assert kept.dtype == torch.int32 and kept[:4].tolist() == [0, 2, -2, -52]
    assert kept[4] > 2**31 - 200 and kept[5] == -(2**31)


def test_empty_values_can_be_stored():
    for name in (*FLOATS, "e8m0", "int32"):
        assert stores.from_store(stores.to_store(torch.zeros(0, 3), name), name).shape == (0, 3)


def test_unknown_stores_are_errors_that_name_the_nearest():
    with pytest.raises(FormatError, match=r"did you mean .*fp16"):
        stores.check_store("fp17", stores.SCALE_STORES, "a scale")


def test_only_exponents_have_no_sign():
    assert [n for n in stores.SCALE_STORES if not stores.is_signed(n)] == ["e8m0"]
