"""SmolLM2 on the engine against transformers: long prompts, greedy texts, its chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import apart, reference

import lowbit
from lowbit import Engine
from lowbit.engine.tokenizer import FolderTokenizer
from lowbit.interchange.hub import smollm2

pytestmark = pytest.mark.slow
PROMPTS = (
    "What is the capital of France?", "Why is the sky blue?", "Write a short poem about the sea.",
    "Explain gravity to a child.", "List three uses of a paper clip.", "Translate 'good morning' into Spanish.",
    "How do I boil an egg?", "Tell me a story about a fox.", "What is 12 times 7?", "Who wrote Hamlet?",
)  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if smollm2.at_hand() is None:
        pytest.skip("SmolLM2 is neither installed nor in the cache")
    folder = tmp_path_factory.mktemp("smollm2") / "w4"
    lowbit.quantize("smollm2", "w4", folder)
    return folder


@pytest.fixture(scope="module")
def model(packed: Path) -> Any:
    return lowbit.load(packed, dtype="float32", kernel="expand")


def test_logits_up_to_4096_tokens(packed: Path, model: Any) -> None:
    text = " ".join(PROMPTS) + "\n" + (Path(lowbit.__file__).parent / "engine" / "engine.py").read_text() * 3
    ids = FolderTokenizer(packed).encode(text)[:4096]
    engines = [
        (Engine.open(packed), 2e-3),
        (Engine.open(packed, cache="int8"), 2e-2),
        (Engine.open(packed, activations="int8"), 0.1),
    ]
    for length in (1, 2, 63, 64, 65, 511, 513, 1500, 4096):
        with torch.inference_mode():
            right = model(torch.tensor([ids[:length]])).logits[0]
        for engine, bound in engines:
            assert apart(engine.logits(ids[:length]), right) < bound, (length, bound)


def test_greedy_texts_are_those_of_transformers(packed: Path, model: Any) -> None:
    engine, same = Engine.open(packed), 0
    answers = engine.generate(list(PROMPTS), max_new_tokens=200)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = engine.tokenizer.prompt(prompt)
        with torch.inference_mode():
            out = model.generate(torch.tensor([ids]), max_new_tokens=200, do_sample=False, pad_token_id=2)
        same += out[0, len(ids) :].tolist() == answer.tokens
    assert same >= 9


def test_inputs_in_int8_are_as_near_as_rounding_lets_them(tmp_path: Path) -> None:
    """A difference in the last bit of float32 flips roundings to int8, and layers multiply that: transformers with one
    part in a million of noise on its embeddings is 0.03 to 0.04 from itself. The engine may not be farther than that."""
    lowbit.quantize("smollm2", "w8a8", tmp_path / "w8a8")
    model: Any = lowbit.load(tmp_path / "w8a8", dtype="float32", kernel="expand")
    ids = FolderTokenizer(tmp_path / "w8a8").prompt(PROMPTS[0] * 8)

    def noisy(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        return output * (1 + 1e-6 * noise)

    right = reference(model, ids)
    with model.model.embed_tokens.register_forward_hook(noisy):
        floor = apart(reference(model, ids), right)
    assert apart(Engine.open(tmp_path / "w8a8").logits(ids), right) < 1.5 * floor


def test_words_and_template(packed: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = FolderTokenizer(packed), AutoTokenizer.from_pretrained(packed)
    chat = [
        {"role": "user", "content": "hi <b> é 日本"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "go"},
    ]
    for messages in (chat, [{"role": "system", "content": "be kind"}, *chat]):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.chat(messages) == text
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False)["input_ids"]


def test_texts_of_a_stream_joined_are_the_text(packed: Path) -> None:
    engine = Engine.open(packed)
    for prompt in ("Write about cats with many emoji 🙂🙃 and umlauts äöü.", "日本語で答えてください。"):
        texts = list(engine.stream(prompt, max_new_tokens=150, temperature=1.0, seed=1))
        found = engine.generate(prompt, max_new_tokens=150, temperature=1.0, seed=1)
        assert "".join(texts) == found.text and "\ufffd" not in "".join(texts[:-1])
        kept = [t for t in found.tokens if t != 2]
        assert found.text == engine.tokenizer.decode(kept)
