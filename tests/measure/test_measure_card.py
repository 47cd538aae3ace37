from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import transformers
from measure_models import full_card, tiny_bert, tiny_llama, tiny_t5

from lowbit.errors import SourceError
from lowbit.measure.card import Card, CardParts
from lowbit.measure.environment import environment
from lowbit.measure.quality import Estimate, Quality
from lowbit.measure.sample import answer, take_sample
from lowbit.measure.speed import Speed
from lowbit.measure.verdict import THRESHOLDS, verdict


def test_json_round_trip_is_the_identity():
    card = full_card()
    assert Card.from_json(card.to_json()) == card


def test_missing_parts_stay_missing():
    card = Card(CardParts("model", "w4"))
    assert Card.from_json(card.to_json()) == card
    assert json.loads(card.to_json())["quality"] is None
    skipped = full_card(speed=Speed(skipped="cannot generate"), sample=None)
    assert Card.from_json(skipped.to_json()) == skipped


def test_json_carries_what_is_derived():
    data = json.loads(full_card().to_json())
    assert data["parts"]["bits"] == pytest.approx(8 * 90_000_000 / 134_515_008)
    assert data["speed"]["ratios"] == {"decode": 2.0, "prefill": 1.25, "batch": 1.25}


def test_numbers_that_json_lacks_survive():
    broken = Quality("causal", 1, 8, 7, Estimate(math.inf), kl_mean=Estimate(math.nan, 1.0))
    text = full_card(quality=broken).to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    found = Card.from_json(text).quality
    assert found.perplexity.value == math.inf and math.isnan(found.kl_mean.value)


def test_fields_of_a_later_version_are_passed_over():
    data = json.loads(full_card().to_json())
    data["later"] = data["parts"]["later"] = 1
    assert Card.from_json(json.dumps(data)) == full_card()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"parts": {"model": 3, "recipe": "w4"}}', "3", '{"parts": 1}'])
def test_what_is_not_a_card(text):
    with pytest.raises(SourceError, match="not the JSON of a card"):
        Card.from_json(text)


def test_bits_fall_back_to_the_weights():
    assert CardParts("m", "r", parameters=100, weight_bytes=50).bits == 4.0
    assert CardParts("m", "r", parameters=100).bits is None
    assert CardParts("m", "r", weight_bytes=100).bits is None


def test_environment_names_the_versions():
    found = environment()
    assert (found.torch, found.transformers) == (torch.__version__, transformers.__version__)
    assert f"{torch.get_num_threads()} threads" in found.machine


def quality(**values) -> Quality:
    return Quality("causal", 1, 8, 7, Estimate(5.0), **{name: Estimate(v) for name, v in values.items()})


def test_verdict_follows_the_stated_thresholds():
    words = [row.word for row in THRESHOLDS]
    assert words == ["indistinguishable", "very close", "noticeable", "damaged"]
    for row, worse in zip(THRESHOLDS, words[1:], strict=False):
        assert verdict(quality(kl_mean=row.kl)).word == row.word
        assert verdict(quality(kl_mean=row.kl * 1.001)).word == worse
        assert verdict(quality(ratio=row.ratio)).word == row.word
    assert verdict(quality()) is None
    assert verdict(quality(kl_mean=math.nan)).word == "damaged"
    assert verdict(quality(kl_mean=0.2, ratio=1.0)).word == "noticeable"  # KL decides


def test_answer_is_the_greedy_continuation(tokenizer):
    model = tiny_llama(eos_token_id=None)
    ids = tokenizer("w5 w6 w7", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert answer(model, tokenizer, "w5 w6 w7", new=6) == tokenizer.decode(ids[0, 3:], skip_special_tokens=True)


def test_answer_uses_the_chat_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}w1 {{ m.content }} w2{% endfor %}")
    templated = answer(tiny_llama(), tokenizer, "w5", new=6)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert (
        templated == answer(tiny_llama(), tokenizer, "w1 w5 w2", new=6) != answer(tiny_llama(), tokenizer, "w5", new=6)
    )


def test_sample_of_both_models(tokenizer):
    found = take_sample(tiny_llama(), tokenizer, "w5", base=tiny_llama(), new=4)
    assert found.answer == found.base_answer and found.prompt == "w5"
    assert take_sample(tiny_t5(), tokenizer, "w5", new=4).base_answer is None
    assert take_sample(tiny_bert(), tokenizer, "w5") is None


def test_a_card_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        full_card().run_peak = 3
