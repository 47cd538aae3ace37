"""What is measured of models that predict no tokens: the right task for each kind of model, and its figures beside the formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from embedding_files import embedding_files
from measure_models import perturbed, tiny_llama
from test_measure_outputs import SMALL, built

import lowbit
from lowbit.errors import SourceError, TextError
from lowbit.interchange.pooling import Pooling
from lowbit.measure.card import Card
from lowbit.measure.outputs import Outputs, measure_outputs
from lowbit.measure.quality import Estimate
from lowbit.measure.tasks.spans import best_span, span_f1
from lowbit.measure.tasks.task import Figure, Kind, kind_named, tasks
from lowbit.measure.verdict import also, verdict_of_outputs
from lowbit.measure.windows import Windows
from lowbit.report.panel import card_lines
from tiny import tiny_tokenizer

BERT = {"vocab_size": 128, "max_position_embeddings": 64, **SMALL}
TEXT = " ".join(f"{a} and {b} then" for a in "abcdefghij" for b in ("the tin", "an end", "her hat", "that", "inn"))


def bert(head: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    t: Any = transformers
    return getattr(t, head)(t.BertConfig(**BERT, **changes)).eval()


def vision(head: str, kind: str = "ViT", **changes: Any) -> Any:
    torch.manual_seed(0)
    t: Any = transformers
    config = getattr(t, f"{kind}Config")(image_size=32, patch_size=8, **SMALL, **changes)
    return getattr(t, head)(config).eval()


MODELS = {
    "embeddings": lambda: built("bert"),
    "scores": lambda: bert("BertForSequenceClassification", num_labels=1),
    "labels": lambda: bert("BertForSequenceClassification", num_labels=3),
    "token labels": lambda: bert("BertForTokenClassification", num_labels=5),
    "spans": lambda: bert("BertForQuestionAnswering"),
    "image labels": lambda: built("vit"),
    "features": lambda: vision("ViTModel"),
    "ctc": lambda: built("wav2vec2"),
    "whisper": lambda: built("whisper"),
    "clip": lambda: built("clip"),
}
TASKS = {
    "embeddings": ("embeddings", {"cosine", "ranks", "nearest", "top"}),
    "scores": ("scores", {"order", "scores"}),
    "labels": ("labels", {"labels", "probabilities"}),
    "token labels": ("places", {"token_labels"}),
    "spans": ("spans", {"spans", "shared"}),
    "image labels": ("labels", {"labels", "probabilities"}),
    "features": ("features", {"features"}),
    "ctc": ("transcripts", {"words", "transcripts"}),
    "whisper": ("transcripts", {"words", "transcripts"}),
    "clip": ("towers", {"cosine_text", "cosine_image", "text_ranks", "text_nearest"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_has_its_task(name: str) -> None:
    base = MODELS[name]()
    same = measure_outputs(base, base, None)
    task, figures = TASKS[name]
    assert same.task == task and {f.name for f in same.figures} == figures
    for figure in same.figures:
        kind = kind_named(figure.name)
        assert kind is not None and figure.estimate.value == pytest.approx(1.0 if kind.rising else 0.0, abs=1e-9)
    word = verdict_of_outputs(same)
    assert word is not None and word.word == "indistinguishable" and also(same) is None
    moved = measure_outputs(perturbed(base, 3.0), base, None)
    worse = verdict_of_outputs(moved)
    assert worse is not None and worse.word in ("noticeable", "damaged")


def test_one_task_fits_each_model() -> None:
    from lowbit.measure.calling import called
    from lowbit.measure.inputs import inputs_of
    from lowbit.measure.tasks.task import Facts

    for name, make in MODELS.items():
        model = make()
        example = inputs_of(model, None).make[0]()
        facts = Facts(model, example, called(model, example))
        assert [task.name for task in tasks() if task.fits(facts)] == [TASKS[name][0]]


def windows(count: int, length: int = 20) -> Windows:
    ids = torch.randint(4, 128, (count, length), generator=torch.Generator().manual_seed(5))
    return Windows(ids, "t", "", count * length)


def test_figures_of_embeddings_are_their_definitions() -> None:
    """By loops over queries; ranks by sorting."""
    base, cut = built("bert"), windows(14)
    other = perturbed(base, 0.5)
    found = measure_outputs(other, base, cut)

    def embedded(model: Any) -> np.ndarray:
        with torch.no_grad():
            rows = [model(ids[None]).last_hidden_state[0].double().mean(0) for ids in cut.ids]
        rows = [r / r.norm() for r in rows]
        return torch.stack(rows).numpy()

    a, b = embedded(other), embedded(base)
    assert found.cosine is not None and found.cosine.value == pytest.approx(float((a * b).sum(1).mean()), rel=1e-9)
    correlations, nearest, top = [], [], []
    for q in range(14):
        rest = [i for i in range(14) if i != q]
        mine, theirs = (sorted(rest, key=lambda i, e=e: -float(e[q] @ e[i])) for e in (a, b))
        d2 = sum((mine.index(i) - theirs.index(i)) ** 2 for i in rest)
        correlations.append(1 - 6 * d2 / (13 * (169 - 1)))
        nearest.append(mine[0] == theirs[0])
        top.append(len(set(mine[:5]) & set(theirs[:5])) / 5)
    for name, values in (("ranks", correlations), ("nearest", nearest), ("top", top)):
        figure = found.figure(name)
        assert (
            figure is not None
            and figure.value == pytest.approx(np.mean(values), rel=1e-9)
            and figure.stderr is not None
        )
    assert np.mean(correlations) < 0.99  # or nothing was told apart


def test_embeddings_are_pooled_as_the_folder_says() -> None:
    base, cut = built("bert"), windows(3)
    other = perturbed(base, 0.5)
    found = measure_outputs(other, base, cut, pooling=Pooling(("cls",)))
    with torch.no_grad():
        pairs = [[m(ids[None]).last_hidden_state[0, 0].double() for m in (other, base)] for ids in cut.ids]
    wanted = np.mean([float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs])
    assert found.cosine is not None and found.cosine.value == pytest.approx(wanted, rel=1e-6)
    assert found.how == "first token, as the model's folder says"


def test_labels_and_probabilities_by_hand() -> None:
    base, cut = bert("BertForSequenceClassification", num_labels=3), windows(9)
    other = perturbed(base, 1.0)
    found = measure_outputs(other, base, cut)
    with torch.no_grad():
        p, q = (torch.stack([m(ids[None]).logits[0].double().softmax(-1) for ids in cut.ids]) for m in (other, base))
    same, moved = found.figure("labels"), found.figure("probabilities")
    assert same is not None and same.value == float((p.argmax(1) == q.argmax(1)).double().mean())
    assert moved is not None and moved.value == pytest.approx(float((p - q).abs().sum(1).mean() / 2), rel=1e-5)


def test_spans_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        start, end = torch.randn(2, 12, generator=generator)
        allowed = [(i, j) for i in range(12) for j in range(i, min(12, i + 4))]
        assert best_span(start, end, 4) == max(allowed, key=lambda p: float(start[p[0]].double() + end[p[1]].double()))
    assert (
        span_f1((2, 4), (4, 6)) == pytest.approx(1 / 3)
        and span_f1((0, 1), (5, 6)) == 0
        and span_f1((3, 3), (3, 3)) == 1
    )


def test_rerankers_read_pairs() -> None:
    base = bert("BertForSequenceClassification", num_labels=1)
    card = lowbit.evaluate(perturbed(base, 1.0), base, [TEXT], tokenizer=tiny_tokenizer(), windows=8, length=24)
    found = card.outputs
    assert (
        found is not None and found.task == "scores" and {f.name for f in found.figures} == {"order", "first", "scores"}
    )
    assert found.how == "8 beginnings of texts as queries, each with 8 texts"
    order = found.figure("order")
    assert order is not None and -1 <= order.value < 1


def test_ctc_words_by_hand() -> None:
    """Repeats are one, blanks are none, and the tokens that remain are compared."""
    base = built("wav2vec2")
    other = perturbed(base, 1.0)
    from lowbit.measure.inputs import inputs_of

    wrong = count = 0
    for make in inputs_of(base, None).make:
        said = []
        for model in (other, base):
            with torch.no_grad():
                best = model(**make()).logits[0].argmax(-1).tolist()
            said.append(
                [t for i, t in enumerate(best) if t != base.config.pad_token_id and (i == 0 or best[i - 1] != t)]
            )
        table = list(range(len(said[0]) + 1))
        for i, word in enumerate(said[1], 1):  # the other way round than in the code
            row = [i]
            for j, mine in enumerate(said[0], 1):
                row.append(min(row[-1] + 1, table[j] + 1, table[j - 1] + (word != mine)))
            table = row
        wrong, count = wrong + table[-1], count + len(said[1])
    found = measure_outputs(other, base, None).figure("words")
    assert found is not None and found.value == pytest.approx(1 - wrong / count) and count > 0


def test_a_language_model_with_the_files_of_an_embedding_model(tmp_path: Path) -> None:
    """It has a head that nobody asks: the card is of embeddings, in limited time too."""
    base = tiny_llama(vocab_size=128)
    base.save_pretrained(tmp_path / "f")
    tiny_tokenizer().save_pretrained(tmp_path / "f")
    embedding_files(tmp_path / "f", "lasttoken")
    lowbit.quantize(tmp_path / "f", "w8", tmp_path / "q", effort="none")
    for budget in (None, 30.0):
        card = lowbit.evaluate(tmp_path / "q", tmp_path / "f", [TEXT], windows=6, length=16, budget=budget)
        assert card.quality is None and card.outputs is not None and card.outputs.task == "embeddings"
        assert card.outputs.how == "last token, scaled to length 1, as the model's folder says"
        assert card.outputs.cosine is not None and card.outputs.cosine.value > 0.99
        assert Card.from_json(card.to_json()) == card
    with pytest.raises(SourceError, match="makes embeddings, so it has no perplexity; name its float model"):
        lowbit.evaluate(tmp_path / "q", text=[TEXT])
    with pytest.raises(TextError, match="holds no inputs"):
        lowbit.evaluate(tmp_path / "q", tmp_path / "f", [TEXT], inputs=str(tmp_path))


def test_comparing_recipes_is_of_what_predicts_tokens(tmp_path: Path) -> None:
    built("bert").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="a BertModel predicts no tokens, and these are what is compared here"):
        lowbit.compare(tmp_path, ["w8"], text=[TEXT])


def test_inputs_of_the_user(tmp_path: Path) -> None:
    base = built("vit")
    arrays = [{"pixel_values": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i))} for i in range(5)]
    other = perturbed(base, 0.5)
    card = lowbit.evaluate(other, base, inputs=arrays)
    assert card.outputs is not None and card.outputs.inputs == "5 inputs of a list"
    with torch.no_grad():
        p, q = (
            torch.stack([m(**{k: x[None] for k, x in a.items()}).logits[0].double().softmax(-1) for a in arrays])
            for m in (other, base)
        )
    moved = card.outputs.figure("probabilities")
    assert moved is not None and moved.value == pytest.approx(float((p - q).abs().sum(1).mean() / 2), rel=1e-5)
    with pytest.raises(TextError, match="takes no 'pixels'"):
        lowbit.evaluate(base, base, inputs=[{"pixels": [1.0]}])
    with pytest.raises(TextError, match="so that inputs would be ignored"):
        lowbit.evaluate(tiny_llama(), tiny_llama(), [TEXT], tokenizer=tiny_tokenizer(), inputs=arrays)


def test_a_card_in_limited_time_has_fewer_inputs_and_says_so() -> None:
    base = built("bert")
    ticks = iter(range(1000))
    found = measure_outputs(base, base, windows(20), seconds=0.5, clock=lambda: float(next(ticks)))
    assert (found.count, found.of) == (8, 20) and found.inputs == "8 windows of 20 tokens"
    card = lowbit.evaluate(base, base, [TEXT * 3], tokenizer=tiny_tokenizer(), length=16, budget=1e-9)
    assert card.outputs is not None and card.outputs.count == 8 and card.text is not None and card.text.windows == 8
    assert card.budget is not None and any(
        "`lowbit evaluate` measures all of them" in note for note in card.parts.notes
    )


def test_words_of_verdicts() -> None:
    limits = Kind("x", "x", limits=(0.9, 0.8, 0.7)), Kind("y", "y", limits=(0.1, 0.2, 0.3), rising=False)
    assert [limits[0].place(v) for v in (0.95, 0.9, 0.85, 0.75, 0.1, float("nan"))] == [0, 0, 1, 2, 3, 3]
    assert [limits[1].place(v) for v in (0.05, 0.15, 0.25, 0.4, float("nan"))] == [0, 1, 2, 3, 3]
    made = Outputs(
        "i",
        "n",
        Estimate(0.1),
        "embeddings",
        (Figure("cosine", Estimate(0.99, 0.001)), Figure("nearest", Estimate(1.0, 0.0))),
    )
    word = verdict_of_outputs(made)
    assert word == ("very close", "its embeddings differ a little, where the float model was hardly sure")
    near = Outputs("i", "n", Estimate(0.1), "embeddings", (Figure("cosine", Estimate(0.986, 0.001)),))
    assert also(made) is None and also(near) is not None and also(near).word == "noticeable"


def test_figures_of_an_unknown_name_decide_nothing_and_are_not_drawn() -> None:
    strange = Outputs("i", "n", Estimate(0.1), "nothing", (Figure("magic", Estimate(0.5)),))
    card = Card(
        lowbit.evaluate(built("vit"), built("vit"), inputs=[{"pixel_values": np.zeros((3, 32, 32), np.float32)}]).parts,
        outputs=strange,
    )
    assert verdict_of_outputs(strange) is None and "magic" not in str(card_lines(card))
    assert Card.from_json(card.to_json()) == card


def test_texts_and_images_together() -> None:
    """Each image ranks all texts, by loops."""
    torch.manual_seed(0)
    t: Any = transformers
    parts = {"image_size": 32, "patch_size": 8, **SMALL}
    text = {"vocab_size": 128, "max_position_embeddings": 24, "eos_token_id": 2, **SMALL}
    base = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=parts, projection_dim=32)).eval()
    other = perturbed(base, 1.0)
    card = lowbit.evaluate(other, base, [TEXT * 9], tokenizer=tiny_tokenizer(), windows=6, length=16)
    found = card.outputs
    assert found is not None and found.inputs == "6 windows of 16 tokens and 6 synthetic images"
    from lowbit.calibration.text import load_text
    from lowbit.measure.inputs import inputs_of
    from lowbit.measure.windows import make_windows

    cut = make_windows(load_text([TEXT * 9]), tiny_tokenizer(), length=16, limit=6, model=base)
    orders, images = [], []
    for model in (other, base):
        with torch.no_grad():
            outs = [model(**make()) for make in inputs_of(base, cut).make]
        texts = torch.cat([o.text_embeds for o in outs]).double()
        images.append(torch.cat([o.image_embeds for o in outs]).double())
        orders.append([sorted(range(6), key=lambda i, v=v: -float(v @ texts[i])) for v in images[-1]])
    d2 = [sum((a.index(i) - b.index(i)) ** 2 for i in range(6)) for a, b in zip(*orders, strict=True)]
    ranks, best, cosine = found.figure("text_ranks"), found.figure("text_nearest"), found.figure("cosine_image")
    assert ranks is not None and ranks.value == pytest.approx(np.mean([1 - 6 * d / (6 * 35) for d in d2]), abs=1e-9)
    assert best is not None and best.value == np.mean([a[0] == b[0] for a, b in zip(*orders, strict=True)])
    assert cosine is not None and cosine.value == pytest.approx(
        float(torch.cosine_similarity(*images).mean()), rel=1e-6
    )
