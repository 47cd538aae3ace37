from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measure_models import VOCABULARY, perturbed, tiny_bert, tiny_llama, tiny_t5
from torch import nn

from lowbit.calibration.text import load_text
from lowbit.errors import SourceError, TextError
from lowbit.measure import quality
from lowbit.measure.quality import Reference, compare_logits, measure_quality
from lowbit.measure.windows import Windows, make_windows
from tiny import TINY, tiny_model


@pytest.fixture(scope="module")
def windows(tokenizer, words) -> Windows:
    return make_windows(load_text([words]), tokenizer, length=60, limit=7)


class Table(nn.Module):
    """Logits looked up by the token seen, so that every figure is known in closed form."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids]


def window_rows(ids) -> Windows:
    return Windows(torch.as_tensor(ids), "test", "0", 0)


def naive(model: nn.Module, base: nn.Module, windows: Windows):
    """Figures of every token by the definitions, with whole float64 distributions. [windows, tokens]"""
    rows = {"nll": [], "base": [], "kl": [], "top1": []}
    for ids in windows.ids:
        with torch.no_grad():
            logs = [m(ids[None]).logits[0, :-1].double() for m in (model, base)]
        q, p = (torch.exp(x - x.max(-1, keepdim=True).values) for x in logs)
        q, p = q / q.sum(-1, keepdim=True), p / p.sum(-1, keepdim=True)
        index = torch.arange(len(ids) - 1)
        rows["nll"].append(-q[index, ids[1:]].log().numpy())
        rows["base"].append(-p[index, ids[1:]].log().numpy())
        rows["kl"].append((p * (p / q).log()).sum(-1).numpy())
        rows["top1"].append((p.argmax(-1) == q.argmax(-1)).numpy())
    return {name: np.array(values, dtype=np.float64) for name, values in rows.items()}


def test_against_the_definitions(windows):
    base = tiny_llama()
    model = perturbed(base, 0.2)
    found, rows = measure_quality(model, windows, base=base), naive(model, base, windows)

    def stderr(values):
        means = values.mean(axis=1)
        return np.sqrt(((means - means.mean()) ** 2).sum() / (len(means) - 1) / len(means))

    nll, difference = rows["nll"], rows["nll"] - rows["base"]
    close = {"rel": 1e-9}
    assert found.tokens == 7 * 59
    assert found.perplexity.value == pytest.approx(math.exp(nll.mean()), **close)
    assert found.perplexity.stderr == pytest.approx(math.exp(nll.mean()) * stderr(nll), **close)
    assert found.base_perplexity.value == pytest.approx(math.exp(rows["base"].mean()), **close)
    assert found.ratio.value == pytest.approx(found.perplexity.value / found.base_perplexity.value, **close)
    assert found.ratio.stderr == pytest.approx(found.ratio.value * stderr(difference), **close)
    assert found.kl_mean.value == pytest.approx(rows["kl"].mean(), **close)
    assert found.kl_mean.stderr == pytest.approx(stderr(rows["kl"]), **close)
    assert found.kl_p99.value == pytest.approx(np.quantile(rows["kl"], 0.99), **close)
    assert found.top1.value == pytest.approx(rows["top1"].mean(), **close)
    assert found.top1.stderr == pytest.approx(stderr(rows["top1"]), **close)
    assert 0.01 < found.kl_mean.value < 5 and 0 < found.top1.value < 1  # the case says something


def test_perplexity_is_that_of_the_models_own_loss(windows):
    model = tiny_llama()
    with torch.no_grad():
        losses = [model(ids[None], labels=ids[None]).loss.double() for ids in windows.ids]
    found = measure_quality(model, windows)
    assert found.perplexity.value == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-6)
    assert found.kl_mean is None and found.ratio is None and found.top1 is None


def test_of_a_model_with_itself_nothing_is_lost(windows):
    model = tiny_llama()
    for base in (model, perturbed(model, 0.0)):
        found = measure_quality(model, windows, base=base)
        assert (found.kl_mean.value, found.kl_p99.value) == (0.0, 0.0)
        assert (found.ratio.value, found.top1.value) == (1.0, 1.0)


def test_known_divergence():
    """Two tokens, p = (a, 1 - a) against q = (b, 1 - b) everywhere: KL and perplexity by hand."""
    a, b = 0.8, 0.3
    base, model = (Table(torch.tensor([[math.log(x), math.log(1 - x)]] * 2)) for x in (a, b))
    found = measure_quality(model, window_rows([[0, 0, 0, 1], [1, 1, 0, 0]]), base=base)
    kl = a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
    assert found.kl_mean.value == pytest.approx(kl, rel=1e-6)
    assert found.kl_mean.stderr == pytest.approx(0, abs=1e-9)
    assert found.top1.value == 0.0
    nll = -(4 * math.log(b) + 2 * math.log(1 - b)) / 6  # scored: 0, 0, 1 and 1, 0, 0
    assert found.perplexity.value == pytest.approx(math.exp(nll), rel=1e-6)


def test_uniform_model_has_the_vocabularys_perplexity():
    found = measure_quality(Table(torch.zeros(50, 50)), window_rows([[3, 4, 5], [6, 7, 8]]))
    assert found.perplexity.value == pytest.approx(50, rel=1e-9)
    assert found.perplexity.stderr == pytest.approx(0, abs=1e-9)


def test_one_window_has_no_standard_error():
    found = measure_quality(Table(torch.zeros(9, 9)), window_rows([[1, 2, 3]]), base=Table(torch.ones(9, 9)))
    assert found.perplexity.stderr is None
    assert found.kl_p99.stderr is None


def test_standard_errors_are_honest():
    """Over many draws of windows, estimates scatter as their standard errors say."""
    torch.manual_seed(0)
    base = Table(torch.randn(600, 600))
    model = Table(base.table.detach() + torch.randn(600, 600) * torch.rand(600, 1))
    found = [measure_quality(model, window_rows(torch.randint(600, (10, 150))), base=base) for _ in range(80)]
    for name in ("perplexity", "ratio", "kl_mean", "kl_p99", "top1"):
        estimates = [getattr(each, name) for each in found]
        scatter = np.std([each.value for each in estimates], ddof=1)
        claimed = math.sqrt(np.mean([each.stderr**2 for each in estimates]))
        assert 0.65 < claimed / scatter < 1.5, name


def test_few_windows_do_not_claim_to_know_more_than_they_do():
    """Two standard errors hold the truth nearly as often as they should, also of one, two and four windows.

    Over two windows alone they would do so in 70 of 100 cases: Student's t with one degree of freedom.
    """
    generator = np.random.default_rng(0)
    for windows in (1, 2, 4):
        found = [quality.mean_estimate(generator.gamma(0.5, size=(windows, 1023))) for _ in range(400)]
        held = np.mean([abs(each.value - 0.5) < 2 * each.stderr for each in found])
        assert held > 0.9, windows
        assert np.median([each.stderr for each in found]) < 2 * math.sqrt(0.5 / (windows * 1023))


def test_windows_that_agree_by_chance_are_judged_by_their_blocks():
    """By hand: block means 0, 1 and 1, 0 in two windows with the same mean; the windows alone would claim no error at all."""
    ramp = np.repeat([[0.0, 1.0], [1.0, 0.0]], 64, axis=1)
    assert quality.mean_estimate(ramp).stderr == pytest.approx(math.sqrt(1 / 3) / 2)
    assert quality.mean_estimate(ramp[:1]).stderr == pytest.approx(math.sqrt(1 / 2) / math.sqrt(2))
    assert quality.mean_estimate(np.tile(ramp, (4, 1))).stderr == 0.0  # eight windows are enough to go by


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    vocabulary=st.integers(1, 300),
    spread=st.floats(0.01, 60),
    seed=st.integers(0, 999),
)
def test_chunks_do_not_change_the_figures(rows, vocabulary, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    p, q = (spread * torch.randn(rows, vocabulary, generator=generator) for _ in range(2))
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    found = compare_logits(q, targets, p)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    assert np.allclose(found["kl"], (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-9, atol=1e-12)
    assert np.all(found["kl"] >= -1e-12)
    assert np.allclose(found["nll"], -log_q[torch.arange(rows), targets], rtol=1e-9, atol=1e-12)


def test_many_chunks_of_a_wide_vocabulary():
    torch.manual_seed(0)
    p = 3 * torch.randn(7, 200_000)  # one row to a chunk
    q = p + 1e-3 * torch.randn_like(p)
    found = compare_logits(q, torch.arange(7), p)
    # Second order: KL is half the variance under p of the small difference of logits.
    weights, shift = p.double().softmax(-1), (q.double() - p.double())
    expected = (weights * (shift - (weights * shift).sum(-1, keepdim=True)) ** 2).sum(-1) / 2
    assert np.allclose(found["kl"], expected, rtol=1e-2)


def test_bfloat16_logits_are_compared_in_float64():
    torch.manual_seed(0)
    p, q = (torch.randn(5, 64).bfloat16() for _ in range(2))
    found, wide = (compare_logits(b, torch.arange(5), a) for a, b in ((p, q), (p.double(), q.double())))
    assert np.allclose(found["kl"], wide["kl"], rtol=1e-12)


def test_tokens_that_both_rule_out_cost_nothing():
    p, q = (torch.tensor([[1.0, 2.0, -math.inf]]), torch.tensor([[2.0, 1.0, -math.inf]]))
    found, narrow = (compare_logits(b, torch.tensor([0]), a) for a, b in ((p, q), (p[:, :2], q[:, :2])))
    assert found["kl"] == pytest.approx(narrow["kl"], rel=1e-12) and found["kl"][0] > 0.1
    assert compare_logits(p, torch.tensor([0]), torch.ones(1, 3))["kl"][0] == math.inf


def test_encoder_decoder_is_scored_by_its_labels(windows):
    base = tiny_t5()
    with torch.no_grad():
        losses = [base(ids[None], labels=ids[None]).loss.double() for ids in windows.ids]
    found = measure_quality(perturbed(base, 0.1), windows, base=base)
    assert found.kind == "seq2seq"
    assert found.tokens == 7 * 60
    assert found.base_perplexity.value == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-6)
    assert found.kl_mean.value > 0


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_architecture_is_scored_as_its_own_loss_says(name, windows):
    model = tiny_model(name)
    found = measure_quality(perturbed(model, 0.05), windows, base=model)
    with torch.no_grad():
        losses = [model(ids[None], labels=ids[None]).loss.double() for ids in windows.ids]
    assert found.base_perplexity.value == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    assert found.kl_mean.value > 0
    same = measure_quality(model, windows, base=perturbed(model, 0.0))
    assert same.kl_mean.value == pytest.approx(0, abs=1e-9)


def test_masked_model_is_scored_in_place(windows):
    model = tiny_bert()
    with torch.no_grad():
        losses = [model(ids[None], labels=ids[None]).loss.double() for ids in windows.ids]
    found = measure_quality(model, windows, base=perturbed(model, 0.1))
    assert found.kind == "masked"
    assert found.perplexity.value == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-6)


def test_models_without_logits_are_refused(windows):
    with pytest.raises(SourceError, match="AutoModelForCausalLM"):
        measure_quality(tiny_bert("BertModel"), windows)
    with pytest.raises(SourceError, match="no logits for every token"):
        measure_quality(tiny_bert("BertForSequenceClassification"), windows)


def test_models_that_do_not_belong_together(windows):
    with pytest.raises(SourceError, match="load both alike"):
        measure_quality(tiny_bert(), windows, base=tiny_llama())
    with pytest.raises(SourceError, match="copies of one model"):
        measure_quality(tiny_llama(), windows, base=tiny_llama(vocab_size=VOCABULARY + 3))
    with pytest.raises(TextError, match="tokenizer"):
        measure_quality(tiny_llama(vocab_size=20), windows)


def test_base_that_is_not_finite_is_refused():
    broken = Table(torch.full((4, 4), math.nan))
    with pytest.raises(SourceError, match="not finite"):
        measure_quality(Table(torch.zeros(4, 4)), window_rows([[1, 2]]), base=broken)
    found = measure_quality(broken, window_rows([[1, 2], [2, 3]]), base=Table(torch.zeros(4, 4)))
    assert math.isnan(found.perplexity.value) and math.isnan(found.kl_p99.value)


def test_training_mode_and_gradients_are_left_alone(windows):
    model = tiny_llama(attention_dropout=0.5)
    quiet = measure_quality(model, windows)
    model.train()
    model.lm_head.eval()
    found = measure_quality(model, windows)
    assert found == quiet
    assert model.training and model.model.layers[0].training and not model.lm_head.training


def test_reference_keeps_what_fits(windows):
    calls = []
    base = tiny_llama()
    base.register_forward_hook(lambda *_: calls.append(1))
    one = 59 * VOCABULARY * 4
    reference = Reference(base, windows, keep_bytes=3 * one)
    first = measure_quality(perturbed(base, 0.1), windows, base=reference)
    assert len(calls) == 7 + 7  # the copy has the hook too
    again = measure_quality(perturbed(base, 0.1), windows, base=reference)
    assert len(calls) == 14 + 4 + 7
    assert first == again


def test_progress_counts_windows(windows):
    seen = []
    measure_quality(tiny_llama(), windows, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 7) for i in range(1, 8)]
