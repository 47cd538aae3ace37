from __future__ import annotations

import hashlib
import platform
import sys
import types

import pytest
import torch
from measure_models import tiny_bert, tiny_llama

from lowbit.calibration.text import Text, load_text
from lowbit.calibration.windows import Frame
from lowbit.errors import TextError
from lowbit.interchange.hf.running import max_positions
from lowbit.measure.quality import measure_quality
from lowbit.measure.windows import make_windows


def test_default_is_pythons_reference_and_deterministic():
    text = load_text()
    assert platform.python_version() in text.name
    assert len(text.joined) > 200_000
    assert 'The "assert" statement' in text.joined
    assert text == load_text()
    assert text.sha256 == hashlib.sha256(text.joined.encode()).hexdigest()


def test_file_hash_is_that_of_its_bytes(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("héllo\r\nwörld\n".encode())
    text = load_text(str(path))
    assert text.name == "text.txt"
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_text(path) == text


def test_file_named_like_a_dataset_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikitext").write_text("a file")
    assert load_text("wikitext").documents == ("a file",)


def test_list_is_joined_with_blank_lines():
    text = load_text(["one", "two"])
    assert text.joined == "one\n\ntwo"
    assert text.sha256 == hashlib.sha256(b"one\n\ntwo").hexdigest()


@pytest.mark.parametrize(("content", "message"), [(b"\xff\xfe\x00", "not UTF-8"), (b"", "empty"), (b" \n\n", "empty")])
def test_unusable_files(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(TextError, match=message):
        load_text(path)


@pytest.mark.parametrize("source", ["missing.txt", "a folder/x", "/nowhere/text"])
def test_missing_file(source):
    with pytest.raises(TextError, match="no such file"):
        load_text(source)


def test_folder_is_no_text(tmp_path):
    with pytest.raises(TextError, match="cannot be read"):
        load_text(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"), [([], "empty"), ([1], "record 0 .* is a number"), (["\ud800"], "surrogate")]
)
def test_unusable_lists(source, message):
    with pytest.raises(TextError, match=message):
        load_text(source)


def test_split_without_dataset_is_refused():
    with pytest.raises(TextError, match="split"):
        load_text(["a"], split="test")


def test_dataset_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match="pip install datasets"):
        load_text("wikitext:wikitext-2-raw-v1")


def _fake_datasets(monkeypatch, columns, calls):
    class Rows(dict):
        @property
        def column_names(self):
            return list(self)

    def load_dataset(name, configuration, split):
        calls.append((name, configuration, split))
        if name == "broken":
            raise RuntimeError("no such dataset\nmore")
        return Rows(columns)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_dataset_name_configuration_and_split(monkeypatch):
    calls: list = []
    _fake_datasets(monkeypatch, {"text": ["a", "b"]}, calls)
    text = load_text("owner/wiki:raw-v1")
    assert text.documents == ("a", "b")
    assert text.name == "owner/wiki:raw-v1 [test]"
    load_text("wiki", split="train")
    assert calls == [("owner/wiki", "raw-v1", "test"), ("wiki", None, "train")]


def test_dataset_errors_are_one_line(monkeypatch):
    _fake_datasets(monkeypatch, {"question": ["a"]}, [])
    with pytest.raises(TextError, match="question"):
        load_text("squad")
    with pytest.raises(TextError, match=r"no such dataset$"):
        load_text("broken")


def test_windows_tile_the_text_and_drop_the_end(tokenizer, words):
    windows = make_windows(load_text([words]), tokenizer, length=70)
    expected = [int(word[1:]) for word in words.split()]
    assert windows.ids.shape == (8, 70)
    assert windows.ids.flatten().tolist() == expected[:560]
    assert windows.text_tokens == 600
    assert make_windows(load_text([words]), tokenizer, length=70, limit=3).ids.tolist() == windows.ids[:3].tolist()


@pytest.fixture
def special(tokenizer):
    """Begins each text with token 0 and ends it with token 1."""
    from tokenizers.processors import TemplateProcessing

    found = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, unk_token="[UNK]")
    ends = [("[UNK]", 0), ("w1", 1)]
    found.backend_tokenizer.post_processor = TemplateProcessing(single="[UNK] $A w1", special_tokens=ends)
    yield found
    tokenizer.backend_tokenizer.post_processor = None


def test_windows_begin_as_the_tokenizer_begins_a_text(special, words):
    expected = [int(word[1:]) for word in words.split()]
    windows = make_windows(load_text([words]), special, length=50)
    assert windows.ids[:, 0].tolist() == [0] * windows.count and windows.frame == Frame((0,))
    assert windows.ids[:, 1:].flatten().tolist() == expected[: 49 * windows.count] and windows.text_tokens == 600
    # A model that reads a text as a whole, as BERT does, gets its end as well.
    whole = make_windows(load_text([words]), special, length=50, model=tiny_bert())
    assert whole.ids[:, 0].tolist() == [0] * whole.count and whole.ids[:, -1].tolist() == [1] * whole.count
    assert whole.ids[:, 1:-1].flatten().tolist() == expected[: 48 * whole.count]
    with pytest.raises(TextError, match="no room for text"):
        make_windows(load_text([words]), special, length=2, model=tiny_bert())


def test_what_stands_before_a_text_is_not_put_twice(special, tokenizer):
    text = "[UNK] w5 w6 w7 [UNK] w8 w9 w2 w3 w4"  # as a chat template writes it
    windows = make_windows(load_text([text]), special, length=4)
    assert windows.ids.tolist() == [[0, 5, 6, 7], [0, 8, 9, 2]]


def test_nothing_of_the_frame_is_scored(special, words):
    """By hand: the loss of each token of the text, from the logits of the row before it, or at its own place."""
    for model, late in ((tiny_llama(), 1), (tiny_bert(), 0)):
        windows = make_windows(load_text([words]), special, length=20, limit=2, model=model)
        assert windows.frame.after == (() if late else (1,))
        losses = []
        for ids in windows.ids:
            with torch.no_grad():
                logp = model(ids[None]).logits[0].double().log_softmax(-1)
            losses += [-logp[t - late, ids[t]] for t in range(1, 20 if late else 19)]
        found = measure_quality(model, windows)
        assert found.tokens == len(losses)
        assert found.perplexity.value == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-6)


def test_length_is_reduced_to_the_models_positions(tokenizer, words):
    windows = make_windows(load_text([words]), tokenizer, model=tiny_llama(max_position_embeddings=100))
    assert windows.length == 100
    assert any("100" in note and "1024" in note for note in windows.notes)


def test_fewer_windows_than_asked_is_said(tokenizer, words):
    windows = make_windows(load_text([words]), tokenizer, length=200, limit=9)
    assert windows.count == 3
    assert any("3 windows" in note and "9" in note for note in windows.notes)


def test_short_text_says_the_numbers(tokenizer):
    with pytest.raises(TextError, match=r"3 tokens, fewer than one window of 10"):
        make_windows(load_text(["w1 w2 w3"]), tokenizer, length=10)


@pytest.mark.parametrize("wrong", [{"length": 1}, {"length": 10, "limit": 0}])
def test_senseless_numbers(tokenizer, words, wrong):
    with pytest.raises(TextError):
        make_windows(load_text([words]), tokenizer, **wrong)


def test_positions_of_models():
    from transformers import RobertaConfig, RobertaForMaskedLM

    assert max_positions(tiny_bert()) == 64
    assert max_positions(torch.nn.Linear(2, 2)) is None
    config = RobertaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    roberta = RobertaForMaskedLM(config).eval()
    longest = max_positions(roberta)
    assert longest == 32
    ids = torch.full((1, longest), 5)
    roberta(ids)  # takes that many and not one more
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, longest + 1), 5))


def test_text_is_a_value():
    assert Text("a", ("b",), "c") == Text("a", ("b",), "c")
