"""Generation: batches, ends, streams, the sampler, and text as it comes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import build_model, tokens

import lowbit
from lowbit import Engine
from lowbit.engine.detokenizer import AnswerText, Detokenizer, StopStrings
from lowbit.errors import EngineError, RecipeError
from lowbit.kernels.core import core

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def engine(packed_folder: Folder) -> Engine:
    return Engine.open(packed_folder("llama", "int4:g32"), threads=1)


def test_greedy_is_that_of_transformers(engine: Engine, packed_folder: Folder) -> None:
    model = lowbit.load(packed_folder("llama", "int4:g32"), dtype="float32", kernel="expand")
    ids = tokens(20)
    right = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, pad_token_id=0)[0, 20:].tolist()
    found = engine.generate(ids, max_new_tokens=40)
    assert found.tokens == right and found.prompt_tokens == 20
    assert found.reason == ("eos" if right[-1] == 2 else "length")


def test_a_sequence_does_not_depend_on_those_beside_it(engine: Engine) -> None:
    prompts = [tokens(n, n) for n in (1, 2, 30, 64, 65, 200, 600)]
    for sampling in ({}, {"temperature": 0.8, "top_k": 20, "seed": 7, "repetition_penalty": 1.3}):
        together = engine.generate(prompts, max_new_tokens=30, **sampling)
        few = engine.generate(prompts, max_new_tokens=30, batch=2, **sampling)
        assert [r.tokens for r in few] == [r.tokens for r in together]
        if not sampling:
            alone = [engine.generate(p, max_new_tokens=30) for p in prompts]
            assert [r.tokens for r in alone] == [r.tokens for r in together]


def test_seeds(engine: Engine) -> None:
    one, same, other = (
        engine.generate(tokens(9), max_new_tokens=40, temperature=1.0, seed=s).tokens for s in (3, 3, 4)
    )
    assert one == same != other
    twice = engine.generate([tokens(9)] * 2, max_new_tokens=40, temperature=1.0, seed=3)
    assert [r.tokens for r in twice] == [one, other]


def test_ends(engine: Engine, packed_folder: Folder) -> None:
    text = engine.generate("the cat", max_new_tokens=60)
    assert text.reason == "length" and len(text.tokens) == 60 and str(text) == text.text
    stop = text.text[10:13]
    found = engine.generate("the cat", max_new_tokens=60, stop=[stop, "never there"])
    assert found.reason == "stop" and found.text == text.text[: text.text.index(stop)]
    ended = Engine(*_opened(packed_folder("llama", "int4:g32"), frozenset({text.tokens[5]})), threads=1)
    found = ended.generate("the cat", max_new_tokens=60)
    assert found.reason == "eos" and found.tokens == text.tokens[: text.tokens.index(text.tokens[5]) + 1]


def _opened(folder: Path, eos: frozenset[int]) -> tuple[Any, Any, frozenset[int]]:
    from lowbit.engine.opening import opened

    weights, words, _ = opened(folder)
    return weights, words, eos


def test_the_end_is_that_of_the_generation_config(packed_folder: Folder, tmp_path: Path) -> None:
    import shutil

    from lowbit.engine.opening import opened

    shutil.copytree(packed_folder("llama", "int4:g32"), tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    for value, right in ((7, {7}), ([2, 9], {2, 9})):
        file.write_text(json.dumps({"eos_token_id": value}))
        assert opened(tmp_path / "model")[2] == right
    file.unlink()
    assert opened(tmp_path / "model")[2] == {2}


def test_every_end_counts_by_whatever_name_and_program(float_folder: Any, tmp_path: Path) -> None:
    import shutil

    from lowbit.engine.fallback import Transformers
    from lowbit.engine.opening import _of_source
    from lowbit.interchange.opening import open_source

    tmp_path = shutil.copytree(float_folder("llama"), tmp_path / "model")
    free = Engine.open(tmp_path, threads=1).generate(tokens(5), max_new_tokens=20).tokens
    at = next(i for i in range(3, 20) if free[i] not in free[:i])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, free[at]]}))
    assert _of_source(open_source(str(tmp_path)), None)[2] == {
        2,
        free[at],
    }  # as folders of other programs are opened, and hub ids
    found = Transformers.open(str(tmp_path), "for the test").generate(tokens(5), max_new_tokens=20)
    assert (found.tokens, found.reason) == (free[: at + 1], "eos")


def test_streams_are_the_text(engine: Engine) -> None:
    texts: dict[int, str] = {0: "", 1: ""}

    def keep(text: str, index: int) -> None:
        texts[index] += text

    results = engine.generate(["the cat", "a hen"], max_new_tokens=30, stream=keep)
    assert [texts[0], texts[1]] == [r.text for r in results]
    assert "".join(engine.stream("the cat", max_new_tokens=30)) == results[0].text


def test_prompts_that_do_not_fit(engine: Engine) -> None:
    with pytest.raises(EngineError, match="1024 positions"):
        engine.generate(tokens(1000), max_new_tokens=100)
    with pytest.raises(EngineError, match="no tokens"):
        engine.generate("")
    with pytest.raises(RecipeError, match="'temperature'"):
        engine.generate("the", temprature=1.0)
    with pytest.raises(RecipeError, match="top_p=0"):
        engine.generate("the", top_p=0.0)
    with pytest.raises(EngineError, match="without a tokenizer"):
        Engine.open(build_model("llama"), threads=1).generate("the")
    assert engine.generate([]) == []


def naive(logits: np.ndarray, seen: np.ndarray, t: float, k: int, p: float, m: float, r: float) -> np.ndarray:
    """Probabilities by the definitions, in float64."""
    x = logits.astype(np.float64)
    x = np.where(seen > 0, np.where(x > 0, x / r, x * r), x) / t
    order = np.lexsort((np.arange(len(x)), -x))
    kept = order[: k or len(x)]
    mass = np.exp(x[kept] - x.max())
    reached = np.cumsum(mass) - mass < p * mass.sum()
    kept, mass = kept[reached], mass[reached]
    kept, mass = kept[mass >= m * mass[0]], mass[mass >= m * mass[0]]
    found = np.zeros(len(x))
    found[kept] = mass / mass.sum()
    return found


@pytest.mark.parametrize(
    "options",
    [
        (1.0, 0, 1.0, 0.0, 1.0), (0.5, 0, 1.0, 0.0, 1.0), (1.5, 5, 1.0, 0.0, 1.0), (1.0, 0, 0.6, 0.0, 1.0),
        (1.0, 0, 1.0, 0.2, 1.0), (1.0, 0, 1.0, 0.0, 1.8), (0.9, 12, 0.8, 0.05, 1.2),
    ],
)  # fmt: skip
def test_draws_follow_the_definitions(options: tuple[float, int, float, float, float]) -> None:
    module: Any = core()
    source = np.random.default_rng(0)
    logits, seen = source.normal(size=40).astype(np.float32) * 2, (source.random(40) < 0.3).astype(np.uint8)
    right, count = naive(logits, seen, *options), 20000
    random, t, k, p, m, r = module.Random(1), *options
    drawn = np.bincount([module.sample(logits.copy(), random, seen, t, k, p, m, r) for _ in range(count)], minlength=40)
    assert not drawn[right == 0].any()
    spread = np.sqrt(right * (1 - right) / count)
    assert (np.abs(drawn / count - right) <= 5 * spread + 1e-9).all()
    best = np.where(seen > 0, np.where(logits > 0, logits / r, logits * r), logits).argmax()
    assert module.sample(logits.copy(), random, seen, 0.0, k, p, m, r) == best


@pytest.mark.parametrize(
    "options",
    [
        (1.0, 0, 1e-50, 0.0, 1.0), (1e-50, 0, 1.0, 0.0, 1.0), (1e-320, 0, 1.0, 0.0, 1.0), (0.0, 0, 1.0, 0.0, 1e300),
        (1.0, 0, 1e-50, 0.0, 1e300),
    ],
)  # fmt: skip
def test_numbers_too_small_or_large_for_float32_draw_the_likeliest(
    options: tuple[float, int, float, float, float],
) -> None:
    module: Any = core()
    logits, seen = np.array([0, 1, 5, 2], dtype=np.float32), np.array([1, 1, 0, 1], dtype=np.uint8)
    assert {module.sample(logits.copy(), module.Random(i), seen, *options) for i in range(20)} == {2}


def test_a_huge_temperature_draws_from_all_but_what_is_no_number() -> None:
    module: Any = core()
    logits = np.array([np.nan, 1, 5, -np.inf, 2], dtype=np.float32)
    drawn = [module.sample(logits.copy(), module.Random(i), None, 1e300) for i in range(300)]
    assert set(drawn) == {1, 2, 4}


def byte_decode(ids: Any) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def test_only_whole_characters_are_given_out() -> None:
    text = "naïve 日本語 🙂 end" * 20
    stream = Detokenizer(byte_decode)
    texts = [stream.push(byte) for byte in text.encode()]
    assert "".join(texts) == text and not any("\ufffd" in p for p in texts) and stream.close() == ""
    cut = Detokenizer(byte_decode)
    shown = "".join(cut.push(b) for b in "ab€".encode()[:-1])
    assert shown == "ab" and cut.close() == "\ufffd"
    broken = Detokenizer(byte_decode)
    assert "".join(broken.push(b) for b in b"a\xff\xffb") == "a\ufffd\ufffdb"


def test_stop_strings_across_tokens() -> None:
    stops = StopStrings(["<end>", "STOP"])
    assert [stops.push(p) for p in ("a<", "en", "x", "ST", "O")] == ["a", "", "<enx", "", ""]
    assert stops.push("Pmore") == "" and stops.found
    unfinished = StopStrings(["<end>"])
    assert unfinished.push("a<en") + unfinished.close() == "a<en" and not unfinished.found
    overlap = StopStrings(["aab"])
    assert "".join(overlap.push(c) for c in "xaaab") == "xa" and overlap.found
    both = AnswerText(byte_decode, ["é"])
    assert "".join(both.push(b) for b in b"caf") + both.push(0xC3) + both.push(0xA9) == "caf" and both.stopped


def test_a_folder_is_opened_without_transformers(packed_folder: Folder) -> None:
    code = """
import json, sys
from lowbit import Engine
text = Engine.open(sys.argv[1], threads=1).generate("the cat", max_new_tokens=3)
print(json.dumps([len(text.tokens), "transformers" in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(packed_folder("llama", "int4:g32"))], capture_output=True, text=True
    )
    assert json.loads(done.stdout) == [3, False], done.stderr
