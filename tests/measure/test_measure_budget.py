"""Cards in limited time: how many windows they take, of which length, and that what they say is what the windows say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measure_models import perturbed, tiny_llama

import lowbit
from lowbit.errors import RecipeError
from lowbit.measure import quick
from lowbit.measure.card import Card
from lowbit.measure.card_budget import COUNTS, SHORTEST, USUAL, Budget, Ladder, is_clear, length_that_fits
from lowbit.measure.quality import Estimate, Quality, measure_quality
from lowbit.measure.windows import Windows
from tiny import save_tiny, tiny_tokenizer


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def window_rows(ids: list[list[int]]) -> Windows:
    return Windows(torch.tensor(ids), "test", "0", 0)


def quality(kl: float, stderr: float | None) -> Quality:
    return Quality("causal", 2, 8, 14, Estimate(9.0), kl_mean=Estimate(kl, stderr))


CLEAR, NEAR = quality(0.1, 0.001), quality(0.049, 0.01)


def walk(ladder: Ladder, clock: Clock, paces: list[float], found: Quality) -> tuple[int, int]:
    """As `measure_quality` asks: (windows measured, windows that count)."""
    done = 0
    count = ladder(done, lambda n: found)
    while done < count:
        clock.now += paces[done % len(paces)]
        done += 1
        count = ladder(done, lambda n: found)
    return done, count


@given(st.floats(0.0, 500.0), st.lists(st.floats(0.01, 60.0), min_size=1, max_size=30), st.sampled_from([CLEAR, NEAR]))
def test_the_time_is_kept_but_for_one_window_or_the_least_number(seconds, paces, found):
    clock = Clock()
    start = clock.now
    done, count = walk(Ladder(seconds, clock), clock, paces, found)
    assert count in COUNTS and count <= done
    took = [paces[i % len(paces)] for i in range(done)]
    assert clock.now - start == pytest.approx(sum(took))
    assert done == COUNTS[0] or sum(took[:-1]) <= seconds + 1e-6


@pytest.mark.parametrize(
    ("seconds", "found", "expected"),
    [(0.0, CLEAR, 2), (3.9, CLEAR, 2), (4.1, CLEAR, 4), (1000.0, CLEAR, 4), (4.1, NEAR, 4), (9.0, NEAR, 8), (1000.0, NEAR, 24)],
)  # fmt: skip
def test_at_an_even_pace(seconds, found, expected):
    """A second for each window: two in any case, four as a rule, more where the verdict is not clear."""
    clock = Clock()
    assert walk(Ladder(seconds, clock), clock, [1.0], found) == (expected, expected)


def test_work_that_becomes_slow_ends_with_the_number_that_was_reached():
    clock = Clock()
    assert walk(Ladder(10.0, clock), clock, [1.0, 1.0, 20.0], CLEAR) == (3, 2)


@given(st.integers(2, 4096), st.floats(1e-5, 1.0), st.floats(0.0, 300.0))
def test_two_windows_of_the_length_fit_or_it_is_the_shortest(length, rate, seconds):
    found = length_that_fits(length, rate, seconds)
    assert min(length, SHORTEST) <= found <= length
    shorter = [length // f for f in (1, 2, 4, 8) if length // f >= min(length, SHORTEST)]
    assert found in shorter and (2 * found * rate <= seconds or found == shorter[-1])
    longer = [each for each in shorter if each > found]
    assert all(2 * each * rate > seconds for each in longer)


def test_what_is_clear():
    assert is_clear(CLEAR) and not is_clear(NEAR)
    assert not is_clear(quality(0.1, None)) and is_clear(Quality("causal", 1, 8, 7, Estimate(9.0)))


def test_a_budget_counts_from_when_it_is_made():
    clock = Clock()
    budget = Budget(30.0, clock)
    clock.now += 31
    assert budget.used == 31 and budget.left == -1


def test_windows_beyond_those_that_count_are_left_out():
    model, rows = tiny_llama(), window_rows([[i, i + 3, 7, 9, 11, 5] for i in range(5)])
    other = perturbed(model, 0.1)
    few = measure_quality(other, window_rows(rows.ids[:2].tolist()), base=model)
    counts = iter([3, 3, 3, 2])
    assert measure_quality(other, rows, base=model, how_many=lambda done, so_far: next(counts)) == few


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model that the engine computes, one that it does not (its heads are too narrow), both quantized, and a text."""
    root = tmp_path_factory.mktemp("budget")
    model = tiny_llama(head_dim=16, vocab_size=512, max_position_embeddings=256)
    model.save_pretrained(root / "float")
    tiny_tokenizer().save_pretrained(root / "float")
    save_tiny("llama", root / "narrow")
    lowbit.quantize(root / "float", "int4:g32", root / "q")
    lowbit.quantize(root / "narrow", "int4:g32", root / "narrow-q")
    (root / "text.txt").write_text("the cat and the hen are in the tree. " * 200)
    return root


def card_of(room: Path, seconds: float, **how) -> Card:
    return lowbit.evaluate(room / "q", room / "float", room / "text.txt", length=64, budget=seconds, **how)


def test_in_enough_time_it_says_what_the_usual_protocol_says_of_the_same_windows(room):
    found = card_of(room, 600.0, windows=USUAL)
    full = lowbit.evaluate(room / "q", room / "float", room / "text.txt", length=64, windows=USUAL)
    assert full.budget is None and found.budget == 600.0 and full.quality.program == "transformers, float32"
    assert found.text == full.text
    for name in ("perplexity", "base_perplexity", "ratio", "kl_mean", "kl_p99", "top1"):
        mine, other = getattr(found.quality, name), getattr(full.quality, name)
        assert mine.value == pytest.approx(other.value, rel=2e-3, abs=1e-5), name
    assert found.parts.recipe == full.parts.recipe and found.parts.bytes_before == full.parts.bytes_before
    assert Card.from_json(found.to_json()) == found


def test_without_any_time_it_reads_two_short_windows_and_says_so(room):
    found = card_of(room, 0.001)
    assert (found.quality.windows, found.text.windows) == (2, 2) and found.quality.kl_mean.stderr is not None
    assert any("of the" in note and "lowbit evaluate" in note and "--card full" in note for note in found.text.notes)
    assert found.speed.model is None and "--card full" in found.speed.skipped and found.sample is None


def test_windows_that_were_asked_for_are_measured(room):
    assert card_of(room, 0.001, windows=7).quality.windows == 7


def test_each_model_is_opened_once_and_the_float_one_by_its_own_program(room, monkeypatch):
    opened = []
    by = quick.both_by_engine
    monkeypatch.setattr(quick, "both_by_engine", lambda *a: opened.append("engine") or by(*a))
    monkeypatch.setattr(quick, "open_subject", lambda *a: pytest.fail("opened in transformers too"))
    found = card_of(room, 600.0, prompt="the cat")
    assert (
        opened == ["engine"] and found.quality.program.startswith("engine (") and "(float32)" in found.quality.program
    )
    assert found.speed.program.startswith("engine (") and found.speed.base_program.startswith("transformers, ")
    assert found.sample.answer and found.run_peak


def test_where_the_engine_cannot_both_run_in_float32(room):
    found = lowbit.evaluate(
        room / "narrow-q", room / "narrow", room / "text.txt", length=64, budget=600.0, prompt="the cat"
    )
    assert found.quality.program == "transformers, float32, both models" and found.quality.windows == USUAL
    assert found.speed.base_program == "transformers, float32" and "heads of 8" in found.speed.not_engine
    full = lowbit.evaluate(room / "narrow-q", room / "narrow", room / "text.txt", length=64, windows=USUAL)
    assert found.quality.kl_mean == full.quality.kl_mean and found.text.sha256 == full.text.sha256


def test_modules_are_measured_as_they_are():
    model = tiny_llama()
    found = lowbit.evaluate(
        perturbed(model, 0.1), model, ["w1 w2 w3 w4 " * 200], length=16, budget=60.0, tokenizer=words_of(97)
    )
    assert found.quality.kl_mean.value > 0 and found.quality.windows in COUNTS


def words_of(count: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")


def test_what_would_be_ignored_is_refused(room):
    with pytest.raises(RecipeError, match="leave speed and dtype out"):
        card_of(room, 30.0, speed=True)
    with pytest.raises(RecipeError, match="leave speed and dtype out"):
        card_of(room, 30.0, dtype=torch.float32)
