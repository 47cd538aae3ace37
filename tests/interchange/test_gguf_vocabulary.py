"""Tokenizers in GGUF: the name of the pre-tokenizer, and scores that make llama.cpp's way of joining give our tokens."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from lowbit.interchange.exporters.gguf.pretokenizers import pretokenizer_name
from lowbit.interchange.exporters.gguf.vocabulary import refusal, vocabulary
from tiny import tiny_tokenizer

TEXT = "the hen and the cat are in the tree; ten hens can see that. a man ran to the inn then, and it rained again"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def spec(*steps: Any, normalizer: Any = None) -> dict[str, Any]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    if normalizer is not None:
        backend.normalizer = normalizer
    return json.loads(backend.to_str())


def test_pretokenizers_are_known_by_what_they_do() -> None:
    level, plain = pre_tokenizers.ByteLevel, {"add_prefix_space": False}
    bare = level(use_regex=False, **plain)
    assert pretokenizer_name(spec(level(**plain)))[0] == "gpt-2"
    assert pretokenizer_name(spec(pre_tokenizers.Digits(individual_digits=True), level(**plain)))[0] == "smollm"
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    assert pretokenizer_name(spec(split, bare))[0] == "llama-bpe"
    one_digit = pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated")
    assert pretokenizer_name(spec(one_digit, bare, normalizer=normalizers.NFC()))[0] == "qwen2"
    for wrong, word in (
        (spec(level(add_prefix_space=True)), "space before the text"),
        (spec(level(**plain), normalizer=normalizers.Lowercase()), "Lowercase"),
        (spec(pre_tokenizers.Whitespace()), "no other BPE"),
        (spec(pre_tokenizers.Split(Regex("a"), "isolated"), bare), "no name in llama.cpp"),
    ):
        name, why = pretokenizer_name(wrong)
        assert name is None and word in why


def test_classes_of_transformers_have_the_names_of_llama_cpp() -> None:
    """The tokenizers that transformers itself builds for these families."""
    vocab = {"a": 0, "b": 1, "<|endoftext|>": 2}
    for kind, name in ((GPT2Tokenizer, "gpt-2"), (Qwen2Tokenizer, "qwen2")):
        backend = kind(vocab=vocab, merges=[]).backend_tokenizer
        assert pretokenizer_name(json.loads(backend.to_str()))[0] == name


def character_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: BPE on characters with a fallback to bytes, spaces as U+2581, one in front."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special[:3], initial_alphabet=[])
    backend.train_from_iterator([TEXT] * 8, trainer)
    learned = json.loads(backend.to_str())
    vocab = {
        token: i for i, token in enumerate([*special, *(t for t in learned["model"]["vocab"] if t not in special)])
    }
    learned["model"]["vocab"] = vocab
    learned["added_tokens"] = [t | {"id": vocab[t["content"]]} for t in learned["added_tokens"]]
    backend = Tokenizer.from_str(json.dumps(learned))
    backend.add_tokens([AddedToken("\u2581\u2581", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def joined(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """llama.cpp's `llm_tokenizer_spm`, naively: of all neighbours join the pair of the highest score, the leftmost first."""
    ids = {token: i for i, token in enumerate(tokens)}
    parts = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        pairs = [(-scores[ids[a + b]], k) for k, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]
        if not pairs:
            break
        k = min(pairs)[1]
        parts[k : k + 2] = [parts[k] + parts[k + 1]]
    out = []
    for part in parts:
        out += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return out


def test_scores_make_llama_cpps_joining_give_our_tokens() -> None:
    tokenizer = character_tokenizer()
    size = len(tokenizer) + 5
    assert refusal(tokenizer, size) is None
    found = vocabulary(tokenizer, size)
    assert found.model == "llama" and found.pre == "default" and found.space_first and found.merges is None
    assert found.scores is not None and len(found.tokens) == len(found.scores) == len(found.kinds) == size
    assert found.tokens[-1] == f"[PAD{size - 1}]" and found.kinds[-1] == 5
    ids = tokenizer.get_vocab()
    assert [found.kinds[ids[t]] for t in ("<unk>", "<s>", "<0x41>", "e")] == [2, 3, 6, 1]
    assert found.tokens[ids["\u2581\u2581"]] == "  " and found.kinds[ids["\u2581\u2581"]] == 4
    words, generator = TEXT.split(), random.Random(0)
    for _ in range(50):
        text = " ".join(generator.choices([*words, "qZü", "thehen", "nnnn"], k=8))
        assert joined(text, found.tokens, found.scores) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_special_tokens_and_the_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    found = vocabulary(tokenizer, 128)
    assert found.model == "gpt2" and found.pre == "gpt-2" and found.scores is None
    assert found.merges is not None and found.merges[:2] == ["t h", "th e"]
    assert found.ids == {"add_bos_token_id": 1, "add_eos_token_id": 2, "add_unk_token_id": 3, "add_pad_token_id": 0}
    assert (found.adds_bos, found.adds_eos) == (False, False)
    assert found.chat_template == "{{ messages[0].content }}"
    assert [found.kinds[i] for i in (0, 1, 2, 4)] == [3, 3, 3, 1]
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    found = vocabulary(tokenizer, 128)
    assert (found.adds_bos, found.adds_eos) == (True, True)


def test_tokenizers_that_cannot_be_written_say_why() -> None:
    assert "the model 100 tokens" in str(refusal(tiny_tokenizer(), 100))
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], 0)))
    assert "Unigram" in str(refusal(unigram, 100))
    assert "no tokenizer.json" in str(refusal(object(), 100))


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_are_of_their_kind(special: bool) -> None:
    tokenizer = tiny_tokenizer()
    name = "<|im_end|>"
    tokenizer.add_tokens([AddedToken(name, special=special)], special_tokens=special)
    found = vocabulary(tokenizer, 140)
    assert found.kinds[tokenizer.get_vocab()[name]] == (3 if special else 4)
