from __future__ import annotations

import pytest
import torch
from measure_models import tiny_bert, tiny_llama, tiny_t5

from lowbit.measure import backends as backends
from lowbit.measure.backends import Backend
from lowbit.measure.interleave import BATCH_PROMPT
from lowbit.measure.speed import Rates, Speed, SpeedSettings, fit_settings, measure_speed
from lowbit.measure.token_times import greedy_times

FEW = SpeedSettings(prompt=12, new=6, prefill=20, batch=3, batch_length=14, repeats=2)


def recorded(model, record, name):
    """The model, with a note of every generation: who, the shape of its input, and the new tokens."""
    inner = model.generate

    def generate(ids, **options):
        out = inner(ids, **options)
        length = out.shape[1] - (1 if model.config.is_encoder_decoder else ids.shape[1])
        record.append((name, tuple(ids.shape), length))
        return out

    model.generate = generate
    return model


def test_models_do_the_same_work_in_interleaved_rounds():
    record: list = []
    model, base = (recorded(tiny_llama(), record, name) for name in "AB")
    found = measure_speed(model, base=base, settings=FEW)
    work = [((1, 12), 6), ((1, 20), 1), ((3, BATCH_PROMPT), 14 - BATCH_PROMPT)]
    assert record == 3 * [(name, shape, new) for shape, new in work for name in "BA"]
    assert found.settings == FEW
    for rates in (found.model, found.base):
        assert rates.decode > 0 and rates.prefill > 0 and rates.batch > 0
    assert found.ratio("decode") == found.model.decode / found.base.decode


def test_rates_from_a_known_clock(monkeypatch):
    """Each token takes 0.5 s after a first one of 2 s; round after round the machine slows down."""
    slower = iter([100.0] * 3 + [1.0] * 3 + [2.0] * 3 + [4.0] * 3)  # warm-up, then three rounds of three

    def times(model, ids, new):
        slow = next(slower)
        return [slow * (2.0 + 0.5 * i) for i in range(new)]

    monkeypatch.setattr(backends, "greedy_times", times)
    settings = SpeedSettings(prompt=12, new=5, prefill=20, batch=3, batch_length=BATCH_PROMPT + 4, repeats=3)
    found = measure_speed(tiny_llama(), settings=settings)
    assert found.base is None and found.ratio("decode") is None
    assert found.model == Rates(decode=2.0 / 2, prefill=20 / 2.0 / 2, batch=3 * 4 / (2.0 + 3 * 0.5) / 2)


def test_length_is_forced_and_the_models_settings_come_back():
    model = tiny_llama()
    own = model.generation_config
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        first = int(model(ids).logits[0, -1].argmax())
    own.update(eos_token_id=first, do_sample=True, temperature=5.0, repetition_penalty=3.0)
    times = greedy_times(model, ids, 9)
    assert len(times) == 9 and times == sorted(times) and times[0] > 0
    assert model.generation_config is own


@pytest.mark.parametrize("batch", [1, 4])
def test_encoder_decoder_generates_the_same_number(batch):
    record: list = []
    model = recorded(tiny_t5(), record, "t5")
    assert len(greedy_times(model, torch.ones(batch, 7, dtype=torch.int64), 5)) == 5
    assert record == [("t5", (batch, 7), 5)]


@pytest.mark.parametrize("name", ["gpt2", "mamba", "bloom", "gemma3", "mixtral", "opt"])
def test_many_architectures_generate(name):
    from tiny import tiny_model

    assert len(greedy_times(tiny_model(name), torch.ones(2, 5, dtype=torch.int64), 4)) == 4


def test_what_cannot_generate_is_skipped_and_says_so():
    found = measure_speed(tiny_bert())
    assert "BertForMaskedLM does not generate" in found.skipped
    assert found.model is None and found.ratio("decode") is None


@pytest.mark.parametrize("longest", [8, 20, 64, 100, 150, 600, 10_000])
def test_settings_fit_the_model(longest):
    fitted = fit_settings(SpeedSettings(), [None, longest, 10_000])
    assert fitted.prompt >= 1 and fitted.new >= 2 and fitted.prefill >= 1
    assert fitted.prompt + fitted.new <= longest
    assert fitted.prefill + 1 <= longest
    assert fitted.batch_length <= longest
    if longest > 513:
        assert fitted == SpeedSettings()


def test_settings_without_a_limit_stay():
    assert fit_settings(SpeedSettings(), [None, None]) == SpeedSettings()


def test_a_short_model_is_measured_within_its_positions():
    found = measure_speed(tiny_llama(max_position_embeddings=16), settings=FEW)
    assert found.settings.prefill == 15 and found.model.prefill > 0


def test_batch_can_be_left_out():
    settings = SpeedSettings(prompt=5, new=3, prefill=8, batch=0, repeats=1)
    found = measure_speed(tiny_llama(), settings=settings)
    assert found.model.batch is None and found.model.decode > 0


def test_progress_reaches_the_total():
    seen = []
    measure_speed(tiny_llama(), settings=FEW, progress=lambda *each: seen.append(each))
    assert seen == [(i, 9) for i in range(1, 10)]


def test_nothing_measured_has_no_ratio():
    assert Speed(model=Rates(1.0, 1.0), base=Rates(2.0, 1.0)).ratio("batch") is None


def test_what_ran_is_said_and_pytorch_gets_as_many_threads():
    import torch

    seen, before = [], torch.get_num_threads()

    def probes(settings):
        return {name: lambda: float(not seen.append(torch.get_num_threads())) for name in ("decode", "prefill")}

    program = Backend("an engine", probes, threads=before + 1, note="no reason")
    found = measure_speed(program, base=tiny_llama().bfloat16(), settings=FEW)
    assert set(seen) == {before + 1} and torch.get_num_threads() == before
    assert (found.program, found.base_program) == ("an engine", "transformers, bfloat16")
    assert found.not_engine == "no reason"
    assert measure_speed(tiny_llama(), settings=FEW).program == "transformers, float32"
