from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader, TensorDataset

from lowbit.budget.fisher import cut
from lowbit.calibration import decoding, selftext
from lowbit.calibration.data import Calibration, load_calibration
from lowbit.calibration.windows import Frame
from lowbit.errors import TextError
from lowbit.interchange.hf.fast_decoding import grouped_attention
from lowbit.interchange.opening import open_source
from tiny import VOCAB, save_tiny, tiny_model, tiny_tokenizer

WORDS = " ".join(f"the cat and {i} hats in the inn;" for i in range(300))
CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
ATTENTIONS = ("llama", "qwen3", "gpt2", "gpt-neox", "gemma3", "opt", "mixtral", "mamba", "bloom", "falcon")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def chatty():
    found = tiny_tokenizer()
    found.chat_template = CHATML
    return found


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def encoded(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_file_gives_windows_spread_evenly(tmp_path, tokenizer, llama):
    path = tmp_path / "words.txt"
    path.write_text(WORDS)
    found = load_calibration(path, tokenizer, llama, samples=4, length=50)
    ids = encoded(tokenizer, WORDS)
    total = len(ids) // 50
    starts = [50 * (i * total // 4) for i in range(4)]
    assert [window.tolist() for window in found.ids] == [ids[s : s + 50] for s in starts]
    assert starts[-1] > len(ids) / 2 and all(window.dtype is torch.int64 for window in found.ids)
    assert found.to_json() == {"name": "words.txt", "windows": 4, "tokens": 200, "sha256": found.sha256}


@pytest.fixture
def beginning():
    """A tokenizer that puts <s> before a text and </s> after it."""
    found = tiny_tokenizer()
    found.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return found


def test_windows_begin_as_the_tokenizer_begins_a_text(beginning, llama):
    ids = encoded(beginning, WORDS)
    found = load_calibration([WORDS], beginning, llama, samples=4, length=50)
    count = len(ids) // 49
    starts = [49 * (i * count // 4) for i in range(4)]
    assert [window.tolist() for window in found.ids] == [[1, *ids[s : s + 49]] for s in starts]
    assert found.frame == Frame((1,))
    for model in (tiny_model("bert"), tiny_model("t5")):  # they read a text as a whole, its end included
        whole = load_calibration([WORDS], beginning, model, samples=2, length=50)
        assert whole.ids[0].tolist() == [1, *ids[:48], 2] and whole.frame == Frame((1,), (2,))


def test_a_template_that_writes_the_begin_token_writes_it_once(beginning, llama):
    beginning.chat_template = CHATML
    talk = [{"role": "user", "content": "the cat and the hats in the inn"}] * 6
    found = load_calibration([talk] * 4, beginning, llama, samples=9, length=20)
    assert all(window[0] == 1 and window[1] != 1 for window in found.ids)


def test_pieces_for_sensitivity_begin_so_too(beginning, llama):
    found = load_calibration([WORDS], beginning, llama, samples=2, length=50)
    pieces, _ = cut(found.ids, 100, 10, found.frame)
    text = [i for window in found.ids for i in window[1:].tolist()]
    assert pieces[0].tolist() == [1, *text[:9]] and all(len(p) == 10 and p[0] == 1 and p[1] != 1 for p in pieces)
    own = load_calibration(None, beginning, llama, samples=2, length=50)
    assert own.frame == Frame((1,)) and all(window[0] == 1 and window[1] != 1 for window in own.ids)


def test_records_are_read(tmp_path, chatty, llama):
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "in the inn"}]
    expected = encoded(chatty, "<s>user:the cat</s><s>assistant:in the inn</s>")
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": talk}) + "\n")
    for source in (file, [{"messages": talk}], {"messages": talk}):
        assert load_calibration(source, chatty, llama, length=len(expected)).ids[0].tolist() == expected
    file.write_text("".join(json.dumps({"text": word}) + "\n" for word in ["the", "and"] * 3))
    found = load_calibration(file, chatty, llama, samples=1, length=8)
    assert found.ids[0].tolist() == encoded(chatty, "\n\n".join(["the", "and"] * 3))[:8]


def test_short_text_gives_all_its_windows(tokenizer, llama):
    ids = encoded(tokenizer, WORDS)[:170]
    found = load_calibration([tokenizer.decode(ids)], tokenizer, llama, samples=9, length=50)
    assert torch.cat(found.ids).tolist() == ids[:150]


def test_documents_of_a_list_are_joined_by_a_blank_line(tokenizer, llama):
    found = load_calibration(["the", "and"] * 3, tokenizer, llama, samples=1, length=8)
    assert found.ids[0].tolist() == encoded(tokenizer, "\n\n".join(["the", "and"] * 3))[:8]
    assert load_calibration(iter(["the", "and"] * 3), tokenizer, llama, samples=1, length=8).sha256 == found.sha256


def test_not_one_window_says_the_numbers(tokenizer, llama):
    with pytest.raises(TextError, match="4 tokens, fewer than one calibration window of 9"):
        load_calibration(["the"] * 2, tokenizer, llama, length=9)


def test_hash_is_of_ids_and_their_bounds():
    ids = [torch.tensor([1, 2]), torch.tensor([3])]
    expected = hashlib.sha256(b"".join(n.to_bytes(8, "little") for n in (2, 1, 2, 1, 3))).hexdigest()
    assert Calibration.of("a", ids).sha256 == expected == Calibration.of("b", ids).sha256
    assert Calibration.of("a", [torch.tensor([1]), torch.tensor([2, 3])]).sha256 != expected
    assert Calibration.of("a", [torch.tensor([1, 2]), torch.tensor([4])]).sha256 != expected


def test_length_stops_at_the_positions_of_the_model(tmp_path, tokenizer, llama):
    assert {len(w) for w in load_calibration([WORDS], tokenizer, llama).ids} == {128}
    save_tiny("gpt2", tmp_path)
    assert {len(w) for w in load_calibration([WORDS], None, open_source(tmp_path)).ids} == {128}
    rows = load_calibration([torch.ones(500, dtype=torch.int32)], None, llama)
    assert [len(row) for row in rows.ids] == [128]


def test_dataset_takes_the_split_to_train_on(monkeypatch, tokenizer, llama):
    asked = []

    class Rows(dict):
        column_names = ("text",)

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        return Rows(text=[WORDS])

    monkeypatch.setitem(sys.modules, "datasets", type("datasets", (), {"load_dataset": staticmethod(load_dataset)}))
    found = load_calibration("wiki:raw", tokenizer, llama, samples=2, length=9)
    assert asked == [("wiki", "raw", "train")] and found.name == "wiki:raw [train]"


def test_dataset_out_of_reach_is_an_error(monkeypatch, tokenizer, llama):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match="pip install datasets"):
        load_calibration("owner/wiki", tokenizer, llama)
    with pytest.raises(TextError, match="no such file"):
        load_calibration("absent.txt", tokenizer, llama)


def batches() -> Iterator[dict[str, torch.Tensor]]:
    """Two batches, padded on the right and on the left, then more than anyone may ask for."""
    yield {"input_ids": torch.tensor([[5, 6, 7], [8, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    yield {"input_ids": torch.tensor([[0, 9, 0], [0, 0, 0]]), "attention_mask": torch.tensor([[0, 1, 1], [0, 0, 0]])}
    yield {"input_ids": torch.tensor([[4, 4, 4]])}
    raise AssertionError("asked for more rows than samples")


def test_batches_lose_padding_and_keep_order_and_lengths(llama):
    found = load_calibration(batches(), None, llama, samples=4, length=2)
    assert [row.tolist() for row in found.ids] == [[5, 6, 7], [8], [9, 0], [4, 4, 4]]
    assert found.tokens == 9


@pytest.mark.parametrize(
    "source",
    [
        torch.arange(6).reshape(2, 3),
        [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])],
        [[0, 1, 2], [3, 4, 5]],
        {"input_ids": [[0, 1, 2], [3, 4, 5]]},
        DataLoader(TensorDataset(torch.arange(6).reshape(2, 3)), batch_size=2),
        DataLoader([{"input_ids": torch.tensor([0, 1, 2])}, {"input_ids": torch.tensor([3, 4, 5])}]),
    ],
    ids=["tensor", "tensors", "lists", "mapping", "TensorDataset", "DataLoader"],
)
def test_token_ids_come_in_many_shapes(source, llama):
    assert [row.tolist() for row in load_calibration(source, None, llama).ids] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "empty"),
        (3, "int is no calibration data"),
        ([torch.ones(2, 3)], "float32"),
        ([torch.ones(2, 3, 4, dtype=torch.int64)], r"\(2, 3, 4\)"),
        ([{"labels": torch.tensor([1])}], "no 'input_ids'.*labels"),
        ([{"input_ids": torch.tensor([1, 2]), "attention_mask": torch.tensor([1])}], "mask"),
        ([{"input_ids": torch.tensor([1, 2]), "attention_mask": torch.tensor([0, 0])}], "padding"),
        ([torch.tensor([VOCAB])], "128"),
        ([object()], "object"),
    ],
)
def test_unusable_token_ids(source, message, llama):
    with pytest.raises(TextError, match=message):
        load_calibration(source, None, llama)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"length": 1}])
def test_senseless_numbers(wrong, tokenizer, llama):
    with pytest.raises(TextError):
        load_calibration([WORDS], tokenizer, llama, **wrong)


def test_chat_wraps_each_document(tmp_path, chatty, llama):
    expected = encoded(chatty, "<s>user:the cat</s><s>user:and hats</s>")
    found = load_calibration(["the cat", "and hats"], chatty, llama, length=len(expected), chat=True)
    assert found.ids[0].tolist() == expected
    assert expected[0] == chatty.bos_token_id  # the template's tokens are not spelt out
    path = tmp_path / "prompts.txt"
    path.write_text("the cat\n \n\nand hats\n")
    assert load_calibration(path, chatty, llama, length=len(expected), chat=True).sha256 == found.sha256
    plain = load_calibration(["the cat", "and hats"], chatty, llama, length=9)
    assert chatty.bos_token_id not in plain.ids[0]


def test_conversations_are_rendered(chatty, llama):
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "in the inn"}]
    expected = encoded(chatty, "<s>user:the cat</s><s>assistant:in the inn</s>")
    assert load_calibration([talk], chatty, llama, length=len(expected)).ids[0].tolist() == expected
    with pytest.raises(TextError, match="conversation 1"):
        load_calibration([talk, [{"role": "user"}]], chatty, llama)


def test_chat_needs_a_template_and_text(tokenizer, chatty, llama):
    for source in (["the cat"], "self"):
        with pytest.raises(TextError, match="no chat template"):
            load_calibration(source, tokenizer, llama, chat=True)
    with pytest.raises(TextError, match="a chat template takes text"):
        load_calibration([torch.tensor([1])], chatty, llama, chat=True)


def test_self_is_deterministic_and_rows_differ(tmp_path, tokenizer):
    save_tiny("llama", tmp_path)
    torch.manual_seed(1)
    first = load_calibration(None, None, open_source(tmp_path), samples=5, length=40)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = load_calibration("self", None, open_source(tmp_path), samples=5, length=40)
    assert torch.equal(state, torch.get_rng_state())
    assert first.sha256 == again.sha256 and "itself, seed 0" in first.name
    assert [tuple(w.shape) for w in first.ids] == [(40,)] * 5
    assert len({tuple(w.tolist()) for w in first.ids}) == 5
    other = load_calibration(None, None, open_source(tmp_path), samples=5, length=40, seed=1)
    assert other.sha256 != first.sha256


def test_self_opens_with_bos_and_draws_no_other_special_token(tokenizer, llama):
    found = load_calibration(None, tokenizer, llama, samples=8, length=100)
    ids = torch.stack(found.ids)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (ids[:, 0] == bos).all()
    assert not torch.isin(ids, torch.tensor([tokenizer.pad_token_id, tokenizer.unk_token_id])).any()
    ends = (ids[:, :-1] == eos).nonzero()
    assert len(ends) and all(ids[row, t + 1] == bos for row, t in ends.tolist())
    assert int(ids.max()) < len(tokenizer) < VOCAB


def test_self_draws_the_second_token_evenly(tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight * 100)  # says the last token again and again
    ids = torch.stack(load_calibration(None, tokenizer, model, samples=60, length=6).ids)
    seconds = set(ids[:, 1].tolist())
    assert len(seconds) > 25 and not seconds & set(tokenizer.all_special_ids)


def test_self_with_chat_writes_both_sides(chatty, llama):
    found = load_calibration(None, chatty, llama, samples=16, length=128, chat=True)
    opening, reply = encoded(chatty, "<s>user:"), encoded(chatty, "<s>assistant:")
    seen = 0
    for window in found.ids:
        ids = window.tolist()
        assert ids[: len(opening)] == opening
        ends = [t for t, token in enumerate(ids) if token == chatty.eos_token_id]
        for turn, t in enumerate(ends):
            expected = (opening if turn % 2 else reply)[: len(ids) - t - 1]
            assert ids[t + 1 : t + 1 + len(expected)] == expected
            seen += 1
    assert seen > 5


def test_long_windows_are_several_documents(monkeypatch, tokenizer, llama):
    monkeypatch.setattr(selftext, "DOCUMENT", 16)
    monkeypatch.setattr(selftext, "_ROWS", 5)
    found = load_calibration(None, tokenizer, llama, samples=3, length=50)
    assert all((window[::13] == tokenizer.bos_token_id).all() and len(window) == 50 for window in found.ids)


def test_drawing_follows_the_softmax():
    logits = torch.tensor([2.0, 0.0, -1.0, 5.0, 1.0]).log_softmax(-1)
    bars = selftext._bars(5, selftext.Opening(banned=(3,)), 4)
    generator = torch.Generator().manual_seed(0)
    drawn = selftext._sample(logits.expand(40_000, 5), bars, generator).bincount(minlength=5) / 40_000
    expected = torch.tensor([2.0, 0.0, -1.0, -torch.inf, -torch.inf]).softmax(-1)
    assert (drawn - expected).abs().max() < 0.01 and drawn[3:].sum() == 0


@pytest.mark.parametrize("name", ATTENTIONS)
def test_decoding_step_by_step_is_the_whole_forward(name):
    model = tiny_model(name)
    ids = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids).logits
        with grouped_attention(model):
            decoder = decoding.Decoder(model, 12)
            found = torch.stack([decoder.read(column[:, None]) for column in ids.unbind(1)], 1)
        assert (found - expected).norm() / expected.norm() < 1e-5
        assert torch.equal(model(ids).logits, expected)  # the user's model is left as it was


@pytest.mark.parametrize("name", ["llama", "mamba", "t5"])
def test_a_prompt_is_read_at_once_and_tokens_follow_one_by_one(name):
    model, prompt = tiny_model(name), torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(0))
    encoder_ids = prompt.flip(1) if name == "t5" else None
    with torch.inference_mode(), grouped_attention(model):
        found = [*decoding.decode(model, prompt, lambda logits: logits.argmax(-1), 6, encoder_ids)]
        ids = torch.cat([prompt, torch.stack(found, 1)], 1)
        given = {"input_ids": ids} if encoder_ids is None else {"input_ids": encoder_ids, "decoder_input_ids": ids}
        assert torch.equal(model(**given).logits[:, 4:-1].argmax(-1), ids[:, 5:])
        assert (
            len([*zip(range(2), decoding.decode(model, prompt, lambda logits: logits.argmax(-1), 6, encoder_ids))]) == 2
        )


def test_memory_of_the_cache_is_taken_once():
    model = tiny_model("llama")
    with torch.inference_mode():
        decoder = decoding.Decoder(model, 6)
        places = []
        for _ in range(6):
            decoder.read(torch.tensor([[5], [6]]))
            places.append([layer.keys.data_ptr() for layer in decoder.cache.layers])
    assert all(place == places[0] for place in places)


def test_encoder_decoder_writes_text(tokenizer):
    model = tiny_model("t5")
    found = load_calibration(None, tokenizer, model, samples=4, length=30)
    assert len({tuple(w.tolist()) for w in found.ids}) == 4 and all(len(w) == 30 for w in found.ids)
    assert not torch.isin(torch.stack(found.ids), torch.tensor([0, 2])).any()


def test_module_of_no_library_writes_text(tokenizer):
    class Bigram(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = transformers.PretrainedConfig(vocab_size=VOCAB, eos_token_id=None)
            self.table = torch.nn.Embedding(VOCAB, VOCAB)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids) * 40  # nearly certain of the next token

    torch.manual_seed(0)
    model = Bigram()
    ids = load_calibration(None, tokenizer, model, samples=2, length=30).ids[0]
    after = [t for t in range(1, 30) if ids[t - 1] > 3 and ids[t] > 3]
    weights = model.table.weight[:, : len(tokenizer)].clone()
    weights[:, [0, 3]] = -torch.inf
    assert sum(int(weights[ids[t - 1]].argmax()) == int(ids[t]) for t in after) > 0.8 * len(after) > 5


def test_self_without_a_tokenizer_says_what_to_pass(llama):
    for model in (llama, open_source(llama)):
        with pytest.raises(TextError, match=r"pass tokenizer=.* or pass token ids"):
            load_calibration(None, None, model)


def test_self_of_a_model_that_writes_nothing(tokenizer):
    with pytest.raises(TextError, match="BertForMaskedLM does not write text"):
        load_calibration(None, tokenizer, tiny_model("bert"), length=20)


def test_self_of_a_broken_model(tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(TextError, match="not finite"):
        load_calibration(None, tokenizer, model, samples=1, length=5)
