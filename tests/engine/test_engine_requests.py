"""What is asked of a generator is checked before anything runs, for the engine and for transformers alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import tokens

from lowbit import Engine
from lowbit.engine.batch import Batch, Running
from lowbit.engine.cache_layout import checked, layers_of
from lowbit.engine.detokenizer import AnswerText
from lowbit.engine.fallback import Transformers
from lowbit.engine.generation import Sampling
from lowbit.errors import EngineError, FormatError, LowbitError, RecipeError
from lowbit.kernels.core import core
from lowbit.kv import CacheFormat
from tiny import save_tiny

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def engine(packed_folder: Folder) -> Engine:
    return Engine.open(packed_folder("llama", "int4:g32"), threads=1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Transformers:
    folder = tmp_path_factory.mktemp("requests") / "gpt2"
    save_tiny("gpt2", folder)
    return Transformers.open(str(folder), "for a test")


@pytest.fixture(scope="module", params=["engine", "transformers"])
def generator(request: pytest.FixtureRequest, engine: Engine, other: Transformers) -> Any:
    return engine if request.param == "engine" else other


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0; ask for 1 or more"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 is not a whole number"),
        ({"stop": ""}, "stop='' ends no answer"),
        ({"stop": ["a", ""]}, "stop='' ends no answer"),
        ({"stop": [5]}, "stop=5 ends no answer"),
        ({"stop": 5}, "stop=5 ends no answer"),
        ({"temperature": -1.0}, "temperature=-1.0; it must be 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan is not a number"),
        ({"temperature": float("inf")}, "temperature=inf is not a number"),
        ({"temperature": "1"}, "temperature='1' is not a number"),
        ({"top_k": 1.5}, "top_k=1.5 is not a whole number"),
        ({"top_k": 2**31}, "top_k=2147483648"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
        ({"temprature": 1.0}, "did you mean 'temperature'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str, generator: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        generator.generate("the cat", **options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([[]], "without tokens"),
        ([3, 4.5], "text or token ids"),
        ([3, "the"], "text or token ids"),
        (None, "this is a NoneType"),
        (7, "this is a int"),
        ([1, 2, 5000], "token 5000 is outside of the vocabulary"),
        ([1, -1], "token -1 is outside"),
        (torch.tensor([0.5]), "text or token ids"),
    ],
)
def test_prompts_that_are_none(prompt: Any, words: str, generator: Any) -> None:
    with pytest.raises(EngineError, match=words):
        generator.generate(prompt, max_new_tokens=2)


def test_prompts_of_every_kind_are_one_or_several(generator: Any) -> None:
    def made(prompt: Any) -> Any:
        return generator.generate(prompt, max_new_tokens=3)

    right = made([5, 6, 7]).tokens
    for alone in (
        (5, 6, 7),
        np.array([5, 6, 7]),
        torch.tensor([5, 6, 7]),
        list(np.array([5, 6, 7])),
        list(torch.tensor([5, 6, 7])),
    ):
        assert made(alone).tokens == right
    for several in ([[5, 6, 7]] * 2, torch.tensor([[5, 6, 7]] * 2), [np.array([5, 6, 7]), (5, 6, 7)]):
        assert [r.tokens for r in made(several)] == [right] * 2
    mixed = made(["the cat", [5, 6, 7]])
    assert mixed[1].tokens == right and mixed[0].tokens == made("the cat").tokens
    assert made([]) == []


def test_prompts_that_do_not_fit_say_how_long_they_may_be(engine: Engine, other: Transformers) -> None:
    for generator, most in ((engine, 1024), (other, 128)):
        with pytest.raises(EngineError, match=f"{most + 1} tokens, and this model has {most} positions; shorten"):
            generator.generate(tokens(most - 9, vocabulary=100), max_new_tokens=10)
        assert len(generator.generate(tokens(most - 3, vocabulary=100), max_new_tokens=3).tokens) <= 3


def test_a_stream_says_what_is_wrong_at_once_and_takes_one_prompt(engine: Engine) -> None:
    with pytest.raises(EngineError, match="a list of 2 prompts"):
        engine.stream(["the", "cat"])  # type: ignore[list-item]
    with pytest.raises(EngineError, match="a list of 0 prompts"):
        engine.stream([])
    with pytest.raises(RecipeError, match="temprature"):
        engine.stream("the", temprature=1.0)
    with pytest.raises(EngineError, match="positions"):
        engine.stream("the", max_new_tokens=5000)
    with pytest.raises(RecipeError, match="batch=0"):
        engine.generate("the", batch=0)
    with pytest.raises(RecipeError, match="chunk=0"):
        engine.logits([3], chunk=0)
    text, stream = "", engine.stream("the cat", max_new_tokens=5)
    try:
        while True:
            text += next(stream)
    except StopIteration as end:
        assert end.value.text == text and len(end.value.tokens) == 5


@pytest.mark.parametrize("threads", [0, -3, 1.5, 100_000])
def test_threads_that_cannot_be(threads: Any, packed_folder: Folder) -> None:
    with pytest.raises(RecipeError, match=f"threads={threads}"):
        Engine.open(packed_folder("llama", "int4:g32"), threads=threads)


def test_zero_temperature_and_the_penalty(engine: Engine) -> None:
    greedy = engine.generate("the cat", max_new_tokens=40)
    same = engine.generate("the cat", max_new_tokens=40, top_k=1, seed=9)
    assert same.tokens == greedy.tokens  # without a temperature nothing is drawn
    with pytest.raises(RecipeError, match="top_k and top_p would be ignored at temperature 0"):
        engine.generate("the cat", top_k=3, top_p=0.5)
    one = engine.generate("the cat", max_new_tokens=40, temperature=1.0, top_k=1, seed=9)
    assert one.tokens == greedy.tokens
    strong = engine.generate("the cat", max_new_tokens=40, repetition_penalty=1e6)
    drawn = [t for t in strong.tokens if t not in engine.tokenizer.prompt("the cat")]
    assert len(drawn) == len(set(drawn)) == len(strong.tokens)  # nothing comes twice, nothing of the prompt


def test_a_stop_string_in_what_was_held_back_is_the_reason() -> None:
    """The last token leaves half a character, which becomes text only at the end."""

    def decode(ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    picks = iter([ord("a"), 0xC3])
    core = SimpleNamespace(sample=lambda *rest: next(picks))
    sequence = Running(0, [65], AnswerText(decode, ["a\ufffd"]), 2)
    batch = Batch(
        core,
        lambda cache, chunks, wanted, lengths: [None] * len(wanted),
        SimpleNamespace(sequences=1),
        Sampling(),
        frozenset(),
    )
    texts = [text for _, text in batch.run([sequence])]
    assert sequence.result().text == "".join(texts) == "" and sequence.reason == "stop"


def test_configs_of_unreleased_versions_and_folders_that_hold_nothing(packed_folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(packed_folder("llama", "int4:g32"), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    right = Engine.open(packed_folder("llama", "int4:g32")).generate([5, 6], max_new_tokens=3).tokens
    for version in ("dev", "", None, "v5.1", "5.24.0.dev0", 4):
        file.write_text(json.dumps({**config, "transformers_version": version}))
        assert Engine.open(tmp_path / "model").generate([5, 6], max_new_tokens=3).tokens == right
    (tmp_path / "empty").mkdir()
    with pytest.raises(LowbitError, match=r"config\.json"):
        Engine.open(tmp_path / "empty")
    with pytest.raises(LowbitError, match="nowhere"):
        Engine.open(str(tmp_path / "nowhere"))


def test_seeds_of_numpy_and_no_stop(engine: Engine) -> None:
    how: dict[str, Any] = {"max_new_tokens": 4, "temperature": 1.0}
    plain = engine.generate([[5, 6, 7]] * 2, seed=2**64 - 1, **how)
    same = engine.generate([[5, 6, 7]] * 2, seed=np.uint64(2**64 - 1), stop=None, **how)
    assert [each.tokens for each in same] == [each.tokens for each in plain]


@pytest.mark.parametrize("size", [(0, 8), (-1, 8), (1, 0), (1.5, 8), (1, "8")])
def test_memory_that_cannot_be(engine: Engine, size: tuple[Any, Any]) -> None:
    with pytest.raises(RecipeError, match="(sequences|positions)="):
        engine.kv_cache(*size)


def test_an_interrupted_generation_leaves_the_engine_usable(engine: Engine) -> None:
    right = engine.generate("the cat", max_new_tokens=12)

    def interrupt(text: str, index: int) -> None:
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            engine.generate(["the cat", "a hen"], max_new_tokens=12, stream=interrupt)
        stream = engine.stream("the cat", max_new_tokens=12)
        next(stream)
        stream.close()
    assert engine.generate("the cat", max_new_tokens=12).tokens == right.tokens


@pytest.mark.parametrize("text", ["int8", "kv=int8", "k=int8,v=int8", "v=int8,k=int8", CacheFormat.of("int8")])
def test_a_cache_format_has_one_value_however_it_is_written(text: Any, packed_folder: Folder) -> None:
    assert CacheFormat.of(text) == CacheFormat.of("int8") and str(CacheFormat.of(text)) == "int8"
    engine, wide = (Engine.open(packed_folder("llama", "int4:g32"), threads=1, cache=c) for c in (text, "kv=int16"))
    assert engine.describe().cache == "int8" and wide.describe().cache == "int16"
    assert engine.describe().cache_bytes_per_token < wide.describe().cache_bytes_per_token


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int9", "did you mean 'int8'"),
        ("k=int8", "one for each"),
        ("k=int8,k=int8", "twice"),
        ("int8,v=int16", "twice"),
        ("q=int8", "says nothing of keys or values|unknown grid"),
        ("", "unknown grid"),
        (8, "unknown grid"),
        ("nf4", "whole numbers of a byte.*use int4"),
        ("fp8", "whole numbers of a byte.*use int8"),
        ("ternary", "use int2"),
        ("int4:g8", "use g32"),
        ("int4:g32:s=bf16", "use int4:g32"),
        ("uint4:g32:asym", "use uint4:g32:min=fp16"),
        ("int4:16x1", "use 32x1"),
        ("search@int4:g32", "no fit 'search'.*use int4:g32"),
        ("int4:g32:outliers=2", "leave outliers=2 out"),
        ("kvquant3", "calibration text.*use int3"),
        ("k=int4,v=int4:recent=32", "write k=int4:recent=32,v=int4:recent=32"),
        ("k=int4:32x1,v=int4", "write k=int4:32x1:recent=32,v=int4:recent=32"),
        ("k=int8,v=int8,k:3=nf4", "use int4"),
    ],
)
def test_cache_formats_that_the_engine_does_not_compute(text: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, FormatError), match="(?s)cache.*(" + words + ")"):
        Engine.open(tmp_path / "not even looked for", cache=text)


@pytest.mark.parametrize(
    ("text", "width", "words"),
    [("int4:g48", 64, "use g64"), ("int8,k:1=int4:g64", 96, "use g32"), ("rotate@int4", 80, "leave rotate out")],
)
def test_a_cache_format_that_heads_of_this_width_do_not_take(text: str, width: int, words: str) -> None:
    with pytest.raises(RecipeError, match="cache.*" + words):
        layers_of(core(), checked(text), 2, width)


@pytest.mark.parametrize(
    "text", ["int8", "int4:g16", "uint2:32x1:min=fp16", "k=int8,v=int4", "kv=int8,k:0=int16,v:1=int4:g16"]
)
def test_bytes_of_a_token_are_those_of_the_format(text: str, packed_folder: Folder) -> None:
    engine, cache = Engine.open(packed_folder("llama", "int4:g32"), threads=1, cache=text), CacheFormat.of(text)
    shape, total = engine.shape, 0
    for layer in range(shape.layers):
        for side in (cache.side(layer, "k"), cache.side(layer, "v")):
            # Integers of 16 bits have a scale of 4 bytes besides.
            total += shape.key_heads * (side.nbytes(64, shape.head_dim) + (4 * 64 if side.exact else 0))
    assert engine.describe().cache_bytes_per_token == -(-total // 64)


@pytest.mark.parametrize("text", ["int4:g16:recent=8", "int4:32x1", "int8:sinks=3"])
def test_a_conversation_goes_on_from_what_a_cache_still_reads_exactly(text: str, packed_folder: Folder) -> None:
    """Whatever was written before: the same logits as of a text that is read for the first time."""
    engine = Engine.open(packed_folder("llama", "int4:g32"), threads=1, cache=text)
    rng = np.random.default_rng(3)
    ids = rng.integers(1, engine.shape.vocabulary, 900).tolist()
    cache = engine.kv_cache(1, 1000)
    first = engine.forward(cache, [(0, ids, 0)], [0]).copy()
    for back in (850, 640, 100, 0):
        other = ids[:back] + rng.integers(1, engine.shape.vocabulary, 40).tolist()
        begin = back if cache.can_go_on(0, back) else 0
        found = engine.forward(cache, [(0, other[begin:], begin)], [0]).copy()
        fresh = engine.forward(engine.kv_cache(1, 1000), [(0, other, 0)], [0])
        assert (found == fresh).all(), (back, begin)
    assert first.shape == found.shape
