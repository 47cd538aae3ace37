"""check_kv: figures beside the float cache, facts, sensitivity of layers, and the recommendation, on tiny models."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lowbit
from lowbit.calibration.windows import Frame, text_ids
from lowbit.errors import RecipeError, SourceError, TextError
from lowbit.kv import CacheFormat
from lowbit.measure.kv import choose_cache
from lowbit.measure.kv.allocate import cache_format, globs
from lowbit.measure.kv.drift import Drift, drifts
from lowbit.measure.kv.figures import CacheFigures, Decile, Depth, Repetition
from lowbit.measure.kv.runner import Runner
from lowbit.measure.kv.sensitivity import measure_sensitivity
from lowbit.measure.kv.stored import FormatCache, OneSide, stored_side
from lowbit.measure.kv.tasks import questions, repetition, retrieval
from lowbit.measure.kv.words import judged
from lowbit.measure.quality import Estimate
from tiny import tiny_model, tiny_tokenizer

TEXT = ["the cat sat on the mat and the dog ran in the inn near an old stone wall. " * 40]
CANDIDATES = ("int8", "rotate@int4", "int4:8x1", "int2")


def lively(name: str = "llama") -> Any:
    """A tiny model whose attention looks at something."""
    model = tiny_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


@pytest.fixture(scope="module")
def found() -> lowbit.CacheCheck:
    return lowbit.check_kv(
        lively(), ["int16", "int8", "int2"], TEXT, context=96, windows=2, kl=0.02, candidates=CANDIDATES, tokenizer=tiny_tokenizer()
    )  # fmt: skip


def test_the_exact_cache_differs_by_nothing_and_fewer_bits_by_more(found: lowbit.CacheCheck) -> None:
    exact, eight, two = found.rows
    assert exact.kl.value == 0.0 and exact.top1.value == 1.0 and exact.bits == 16.0
    assert all(decile.kl.value == 0.0 for decile in exact.deciles)
    assert 0 < eight.kl.value < two.kl.value and two.bits < eight.bits < 16
    assert exact.perplexity == found.base_perplexity
    assert len(two.deciles) == 10 and two.deciles[0].first == 0 and two.deciles[-1].last == 95


def test_deciles_are_means_over_windows_with_their_standard_error() -> None:
    kl = np.random.default_rng(0).random((12, 95))
    drift = Drift({"kl": kl, "top1": kl, "nll": kl, "base_nll": kl})
    part = kl[:, 10:19].mean(1)
    second = drift.deciles()[1]
    assert (second.first, second.last) == (10, 19)
    assert second.kl.value == pytest.approx(part.mean())
    assert second.kl.stderr == pytest.approx(part.std(ddof=1) / math.sqrt(12))
    assert drift.perplexity().value == pytest.approx(math.exp(kl.mean()))


def test_divergence_is_that_of_the_two_distributions() -> None:
    model, ids = lively(), torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(3))
    runner, cache = Runner(model), FormatCache(CacheFormat.of("int2"))
    (drift,) = drifts(runner, ids, [cache])
    p, q = (runner.logits(runner.run(ids[0], c), slice(0, 39)).double().log_softmax(-1) for c in (None, cache))
    assert drift.figures["kl"][0] == pytest.approx((p.exp() * (p - q)).sum(-1).numpy(), rel=1e-6)


def test_the_recommendation_holds_its_limit_and_is_a_format(found: lowbit.CacheCheck) -> None:
    assert found.recommended is not None and found.recommended.figures is not None
    row = found.recommended.figures
    assert row.kl.value <= 0.02 and row.bits < 16
    assert str(CacheFormat.of(row.format)) == row.format
    again = lowbit.check_kv(
        lively(), row.format, TEXT, context=96, windows=2, recommend=False, tokenizer=tiny_tokenizer()
    )
    assert again.rows[0].kl.value == pytest.approx(row.kl.value, rel=1e-6) and again.rows[0].bits == pytest.approx(
        row.bits
    )


def test_a_wider_limit_takes_no_more_bits() -> None:
    bits = []
    for limit in (1e-5, 0.01, 1.0):
        fmt, report = choose_cache(
            lively(), TEXT, limit, context=96, windows=1, candidates=CANDIDATES, tokenizer=tiny_tokenizer()
        )
        figures = report.recommended and report.recommended.figures
        bits.append(16.0 if fmt.exact or not figures else figures.bits)
    assert bits == sorted(bits, reverse=True) and bits[0] > bits[-1]


def test_sides_alone_add_up_to_about_the_whole() -> None:
    runner, ids = Runner(lively()), torch.randint(3, 128, (2, 96), generator=torch.Generator().manual_seed(4))
    found = measure_sensitivity(runner, ids, ("rotate@int4",))
    predicted = found.total("k", "rotate@int4") + found.total("v", "rotate@int4")
    (whole,) = drifts(runner, ids, [FormatCache(CacheFormat.of("rotate@int4"))])
    assert predicted == pytest.approx(whole.kl.value, rel=0.7)
    place = max(found.alone, key=lambda place: found.alone[place][1])
    (alone,) = drifts(runner, ids, [OneSide(*place, stored_side(CacheFormat.of("rotate@int4").keys))])
    late = alone.figures["kl"][:, 48:].mean()
    assert found.alone[place][1] == pytest.approx(late, rel=1e-3)  # layers before it were replayed, not run


@pytest.mark.parametrize("numbers", [[0], [0, 1, 2, 15, 17], list(range(30)), [9, 10, 109, 110]])
def test_globs_match_these_layers_and_no_others(numbers: list[int]) -> None:
    from fnmatch import fnmatchcase

    matched = [i for i in range(200) if any(fnmatchcase(str(i), glob) for glob in globs(numbers))]
    assert matched == numbers


def test_a_choice_for_each_side_is_one_format() -> None:
    picks = {
        (i, w): "int8" if (i, w) in {(3, "k"), (11, "k"), (12, "v")} else "int4:g32" for i in range(14) for w in "kv"
    }
    fmt = cache_format(picks)  # type: ignore[arg-type]
    assert {(i, w): str(fmt.side(i, w)) for i, w in picks} == picks  # type: ignore[arg-type]


def test_facts_stand_at_their_depths_and_are_asked_at_the_end() -> None:
    tokenizer = tiny_tokenizer()
    text = text_ids(TEXT[0], tokenizer)
    asked = questions(text, 1500, tokenizer, Frame((1,)), 0)
    assert asked is not None and len(asked.ids) <= 1500 and int(asked.ids[0]) == 1
    words = tokenizer.decode(asked.ids)
    for depth, place in asked.answers:
        answer = tokenizer.decode(asked.ids[place]).strip()
        assert len(answer) == 4 and answer.isdigit() and words.count(answer) == 2
        assert words.index(answer) / len(words) == pytest.approx(depth, abs=0.2)
    assert [depth for depth, _ in asked.answers] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert questions(text, 60, tokenizer, Frame(), 0) is None


def test_retrieval_and_repetition_of_the_exact_cache_are_the_float_ones() -> None:
    runner, tokenizer = Runner(lively()), tiny_tokenizer()
    one = questions(text_ids(TEXT[0], tokenizer), 1000, tokenizer, Frame(), 1)
    assert one is not None
    ids = type(one)(one.ids[:128], tuple((d, slice(100 + i, 102 + i)) for i, (d, _) in enumerate(one.answers)))
    exact, two = retrieval(runner, [ids], [FormatCache(CacheFormat()), FormatCache(CacheFormat.of("int2"))])
    assert all(d.logprob == d.base_logprob and d.found == d.base_found for d in exact)
    assert any(d.logprob != d.base_logprob for d in two)
    first, second = repetition(runner, 30, 128, 2, [FormatCache(CacheFormat()), FormatCache(CacheFormat.of("int2"))])
    assert first.loss == first.base_loss and second.loss != second.base_loss


def outliers() -> Any:
    """The script that makes keys with outlier channels."""
    path = Path(__file__).parents[2] / "benchmarks" / "key_outliers.py"
    spec = importlib.util.spec_from_file_location("key_outliers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_keys_with_outlier_channels_are_told_before_a_user_meets_them() -> None:
    plain = lively()
    wide = lively()
    outliers().widen_keys(wide, channels=1, factor=200.0)
    ids = torch.arange(3, 60)
    a, b = Runner(plain), Runner(wide)
    assert torch.allclose(
        a.logits(a.run(ids), slice(0, 57)), b.logits(b.run(ids), slice(0, 57)), atol=1e-3
    )  # the same function
    how = {
        "context": 96,
        "windows": 2,
        "tokenizer": tiny_tokenizer(),
        "candidates": ("int8", "int8:8x1", "int4:8x1"),
        "kl": 0.01,
    }
    before = lowbit.check_kv(plain, ["int4"], TEXT, recommend=False, **how)
    after = lowbit.check_kv(wide, ["int4"], TEXT, **how)
    assert after.rows[0].kl.value > 3 * before.rows[0].kl.value
    assert after.recommended is not None and after.recommended.figures is not None
    assert after.recommended.figures.kl.value <= 0.01


def row(kl: float = 0.001, last: float | None = None, found: int = 9, loss: float = 1.0) -> CacheFigures:
    values = [kl] * 8 + [kl if last is None else last] * 2
    deciles = tuple(Decile(i, i + 1, Estimate(v, 1e-5), Estimate(1.0, 0.0)) for i, v in enumerate(values))
    again = Repetition(10, Estimate(1.0, 0.01), Estimate(loss, 0.01))
    facts = (Depth(0.5, 10, 9, found, -1.0, -1.0),)
    return CacheFigures(
        "int4", "int4", 4.25, 4.25, 4.25, 100.0, Estimate(9.0, 0.1), Estimate(kl, 1e-5), Estimate(1.0, 0.0), deciles, facts, again
    )  # fmt: skip


def test_words_say_what_breaks() -> None:
    good = judged(row())
    assert (good.word, good.breaks, len(good.sentences)) == ("indistinguishable", False, 1)
    drifting = judged(row(0.001, last=0.04))
    assert drifting.word == "very close" and "grows worse along the context" in drifting.sentences[-1]
    assert judged(row(2.0)).breaks and judged(row(2.0)).word == "damaged"
    lost = judged(row(found=1))
    assert lost.breaks and lost.word == "damaged" and "finds 1 of 10 facts" in " ".join(lost.sentences)
    assert "comes again" in " ".join(judged(row(loss=2.0)).sentences)


def test_it_goes_to_json_and_to_a_screen_of_80_columns(found: lowbit.CacheCheck) -> None:
    told = json.loads(found.to_json())
    assert [r["format"] for r in told["rows"]] == ["int16", "int8", "int2"]
    assert told["recommended"]["kl_limit"] == 0.02 and len(told["sensitivity"]) == 4
    lines = str(found).splitlines()
    fmt = found.recommended.format if found.recommended else ""
    assert any(fmt in line for line in lines)
    assert all(len(line) <= 80 or fmt in line for line in lines)


def test_errors_say_what_to_do() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(RecipeError, match="too short"):
        lowbit.check_kv(lively(), ["int8"], TEXT, context=8, tokenizer=tokenizer)
    with pytest.raises(RecipeError, match="no limit"):
        lowbit.check_kv(lively(), ["int8"], TEXT, kl=-1.0, tokenizer=tokenizer)
    with pytest.raises(TextError):
        lowbit.check_kv(lively(), ["int8"], ["the cat"], context=64, tokenizer=tokenizer)
    with pytest.raises(SourceError, match="keeps no keys and values"):
        lowbit.check_kv(tiny_model("mamba"), ["int8"], TEXT, context=64, tokenizer=tokenizer)
    with pytest.raises(SourceError, match="next token"):
        lowbit.check_kv(tiny_model("bert"), ["int8"], TEXT, context=64, tokenizer=tokenizer)


def test_attention_of_its_own_goes_token_by_token_and_says_so() -> None:
    found = lowbit.check_kv(tiny_model("bloom"), ["int8"], TEXT, context=40, windows=1, tokenizer=tiny_tokenizer())
    assert found.recommended is None and any("one by one" in note for note in found.notes)
    assert 0 <= found.rows[0].kl.value < 1e-3
