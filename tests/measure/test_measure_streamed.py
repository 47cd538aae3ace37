"""Models measured block by block: the same figures as whole, one block in memory, and a run that was killed goes on."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.blockwise import stored_walk
from lowbit.blockwise.widening import NARROW
from lowbit.errors import RecipeError
from lowbit.interchange.opening import open_source
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from lowbit.measure import streamed, streamed_card
from lowbit.measure.card import Card
from lowbit.measure.card_budget import COUNTS
from lowbit.measure.kept import Kept
from lowbit.measure.quality import Quality, measure_quality
from lowbit.measure.streamed import PROGRAM, Streamed, stream_quality
from lowbit.measure.subject import folder_parts, parts_of
from lowbit.measure.windows import Windows
from lowbit.planning import measuring
from tiny import VOCAB, save_tiny
from unusual_models import unusual_model

FIGURES = ("perplexity", "base_perplexity", "ratio", "kl_mean", "kl_p99", "top1")
TEXT = ["the cat and the hen are in the tree, and the rat ran in the rain. " * 60]
HOW: dict[str, Any] = {"text": TEXT, "windows": 3, "length": 40}


def windows(count: int = 3, length: int = 40) -> Windows:
    generator = torch.Generator().manual_seed(3)
    return Windows(torch.randint(4, VOCAB, (count, length), generator=generator), "test", "0", 0)


def close(one: Quality, other: Quality) -> None:
    assert (one.kind, one.windows, one.length, one.tokens) == (other.kind, other.windows, other.length, other.tokens)
    for name in FIGURES:
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert mine.value == pytest.approx(theirs.value, rel=1e-4, abs=1e-6), name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(float folder, folder of lowbit) of a tiny model, each made once."""
    root, known = tmp_path_factory.mktemp("streamed"), dict[str, tuple[Path, Path]]()

    def make(name: str, recipe: str = "absmax@int4:g16", dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
        key = f"{name}-{recipe}-{dtype}".replace("/", "-")
        if key not in known:
            place = root / str(len(known))
            model = save_tiny(name, place / "float")
            if dtype != torch.float32:
                model.to(dtype).save_pretrained(place / "float")
            lowbit.quantize(place / "float", recipe, place / "q")
            known[key] = place / "float", place / "q"
        return known[key]

    return make


@pytest.fixture()
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is small enough to be measured whole."""
    monkeypatch.setattr(measuring, "ROOM", 0)


@pytest.mark.parametrize("logits", [1 << 30, 4 * VOCAB * 7])
@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "gemma2", "gpt2", "opt", "t5", "mixtral", "qwen3-moe", "mamba", "bert"]
)
def test_the_figures_are_those_of_the_whole_models(
    name: str, logits: int, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "LOGITS", logits)
    folder, quantized = made(name)
    base, model = Streamed.of(open_source(folder)), Streamed.of(LowbitFolder(quantized))
    whole = measure_quality(
        lowbit.load(quantized, dtype=torch.float32), windows(), base=open_source(folder).load_float(torch.float32)
    )
    found = stream_quality(model, windows(), base=base)
    close(found, whole)
    assert found.program == PROGRAM
    assert stream_quality(model, windows()).perplexity.value == pytest.approx(whole.perplexity.value, rel=1e-4)


@pytest.mark.parametrize("name", ["zamba", "gemma3n", "xlm", "albert", "marian", "ctrl", "llava"])
def test_the_figures_of_models_whose_blocks_share_weights_or_more(name: str, tmp_path: Path) -> None:
    unusual_model(name).save_pretrained(tmp_path / "float")
    lowbit.quantize(tmp_path / "float", "absmax@int4:g16", tmp_path / "q")
    whole = measure_quality(
        lowbit.load(tmp_path / "q", dtype=torch.float32),
        windows(),
        base=open_source(tmp_path / "float").load_float(torch.float32),
    )
    found = stream_quality(
        Streamed.of(LowbitFolder(tmp_path / "q")), windows(), base=Streamed.of(open_source(tmp_path / "float"))
    )
    close(found, whole)


@pytest.mark.parametrize("recipe", ["w8a8", "absmax@nf4:g16", "int4:g16,embed=keep"])
@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "gpt2"])
def test_weights_in_16_bits_inputs_in_8_and_other_formats(name: str, recipe: str, made: Any) -> None:
    folder, quantized = made(name, recipe, torch.bfloat16)
    whole = measure_quality(
        lowbit.load(quantized, dtype=torch.float32), windows(), base=open_source(folder).load_float(torch.float32)
    )
    found = stream_quality(Streamed.of(LowbitFolder(quantized)), windows(), base=Streamed.of(open_source(folder)))
    close(found, whole)


def test_short_windows_run_together_and_are_apart_in_the_figures(made: Any) -> None:
    folder, quantized = made("llama")
    many = windows(count=70, length=16)
    whole = measure_quality(
        lowbit.load(quantized, dtype=torch.float32), many, base=open_source(folder).load_float(torch.float32)
    )
    close(stream_quality(Streamed.of(LowbitFolder(quantized)), many, base=Streamed.of(open_source(folder))), whole)


def test_one_block_has_its_weights_at_a_time_in_the_type_of_the_file(made: Any, tmp_path: Path) -> None:
    folder, _ = made("llama", dtype=torch.bfloat16)
    walk = Streamed.of(open_source(folder)).walk(windows(), tmp_path)
    seen = []

    def look() -> None:
        here = {n: p for n, p in walk.module.named_parameters() if ".layers." in n and not p.is_meta}
        assert {n.split(".layers.")[1][0] for n in here} == {str(len(seen))}
        assert all(p.dtype in NARROW for p in here.values() if p.dim() == 2)
        seen.append(len(here))

    walk.run_blocks(look)
    assert len(seen) == 2 == walk.count
    walk.end()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_evaluate_says_the_same_by_either_way(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, quantized = made("llama-tied")
    whole = lowbit.evaluate(quantized, folder, **HOW)
    monkeypatch.setattr(measuring, "ROOM", 0)
    found = lowbit.evaluate(quantized, folder, **HOW)
    assert whole.quality is not None and found.quality is not None
    assert whole.quality.program == "transformers, float32" and found.quality.program == PROGRAM
    close(found.quality, whole.quality)
    assert (found.parts, found.text) == (whole.parts, whole.text)
    alone, one = lowbit.evaluate(folder, **HOW), whole.quality.base_perplexity
    assert alone.quality is not None and one is not None
    assert alone.quality.perplexity.value == pytest.approx(one.value, rel=1e-4)
    assert Card.from_json(found.to_json()) == found


def test_modules_and_other_types_are_measured_whole(made: Any, no_room: None) -> None:
    folder, quantized = made("llama-tied")
    module = lowbit.evaluate(quantized, open_source(folder).load_float(), **HOW)
    half = lowbit.evaluate(quantized, folder, dtype="bfloat16", **HOW)
    assert [c.quality and c.quality.program for c in (module, half)] == [
        "transformers, float32",
        "transformers, bfloat16",
    ]


def test_the_rule_is_of_sizes() -> None:
    config = open_config(vocab_size=32_000)
    assert not measuring.block_by_block(135_000_000, 90_000_000, config)
    assert measuring.block_by_block(1_100_000_000, 600_000_000, config)
    assert measuring.whole_bytes(10, 7, config, 100) == 40 + 7 + 2 * 4 * 100 * 32_000
    assert measuring.whole_bytes(0, 7, config, 100) == 7 + 4 * 100 * 32_000


def open_config(**values: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**values)


def test_the_parts_of_a_card_are_known_without_loading(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, quantized = made("gpt2", "w8a8")
    result = lowbit.quantize(folder, "w8a8")
    from_plan, _ = parts_of(result, None)
    from_file = folder_parts(quantized)
    assert (
        from_file.parameters == from_plan.parameters
        and from_file.coverage is not None
        and from_plan.coverage is not None
    )
    assert from_file.coverage.quantized == from_plan.coverage.quantized
    assert from_file.embed_bits == from_plan.embed_bits and from_file.linear_bits == from_plan.linear_bits


def test_speed_and_answer_are_of_the_model_alone_where_there_is_no_memory_for_both(
    made: Any, no_room: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, quantized = made("llama-tied")
    few = lowbit.measure.speed.SpeedSettings(prompt=4, new=3, prefill=6, batch=0, repeats=1)
    size = 4 * 10**6
    monkeypatch.setattr(streamed_card, "memory_now", lambda: (size, "4 MB are free here"))
    card = lowbit.evaluate(quantized, folder, speed=few, prompt="the cat", **HOW)
    assert card.speed is not None and card.speed.model is not None and card.speed.base is not None
    monkeypatch.setattr(streamed_card, "memory_now", lambda: (110_000, "0.1 MB are free here"))
    card = lowbit.evaluate(quantized, folder, speed=few, prompt="the cat", **HOW)
    assert card.speed is not None and card.speed.model is not None and card.speed.base is None
    assert card.speed.alone is not None and "0.1 MB are free here" in card.speed.alone
    assert card.sample is not None and card.sample.base_answer is None
    monkeypatch.setattr(streamed_card, "memory_now", lambda: (10, "nothing is free here"))
    card = lowbit.evaluate(quantized, folder, speed=few, prompt="the cat", **HOW)
    assert card.speed is not None and card.speed.model is None and "nothing is free here" in str(card.speed.skipped)
    assert card.sample is None and card.quality is not None


def test_a_card_in_limited_time(made: Any, no_room: None) -> None:
    folder, quantized = made("llama-tied")
    how = {"text": TEXT, "length": 40, "prompt": "the cat"}
    late = lowbit.evaluate(quantized, folder, budget=0.001, **how)
    assert late.quality is not None and late.text is not None and late.quality.windows == COUNTS[0] == late.text.windows
    assert (
        late.quality.program == PROGRAM and late.sample is None and "no time" in str(late.speed and late.speed.skipped)
    )
    assert any("lowbit evaluate" in note for note in late.text.notes)
    asked = lowbit.evaluate(quantized, folder, budget=0.001, windows=5, **how)
    assert asked.quality is not None and asked.quality.windows == 5


def test_a_verdict_that_is_not_clear_takes_another_pass(
    made: Any, no_room: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, quantized = made("llama-tied")
    monkeypatch.setattr(streamed_card, "is_clear", lambda quality: quality.windows >= 8)
    found = lowbit.evaluate(quantized, folder, TEXT, length=40, budget=600.0)
    assert found.quality is not None and found.quality.windows == 8
    monkeypatch.setattr(measuring, "ROOM", 10**12)
    whole = lowbit.evaluate(quantized, folder, TEXT, length=40, windows=8)
    assert whole.quality is not None
    close(found.quality, whole.quality)


def test_compare_measures_each_recipe_against_one_pass_of_the_float_model(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = made("llama-tied")
    whole = lowbit.compare(folder, ["w8", "absmax@int4:g16"], effort="none", **HOW)
    monkeypatch.setattr(measuring, "ROOM", 0)
    passes = []
    run = stored_walk.StoredWalk.run_blocks
    monkeypatch.setattr(
        stored_walk.StoredWalk,
        "run_blocks",
        lambda self, *a, **k: passes.append(self.stored.source.label) or run(self, *a, **k),
    )
    steps: list[tuple[int, int]] = []
    found = lowbit.compare(
        folder, ["w8", "absmax@int4:g16"], effort="none", progress=lambda *each: steps.append(each), **HOW
    )
    assert len(passes) == 3 and passes.count(str(folder)) == 1
    for mine, other in zip(found, whole, strict=True):
        assert mine.card is not None and other.card is not None and mine.recipe == other.recipe
        assert mine.card.quality is not None and other.card.quality is not None
        close(mine.card.quality, other.card.quality)
        assert dataclasses.replace(mine.card.parts, quantize_seconds=None, weight_bytes=None) == dataclasses.replace(
            other.card.parts, quantize_seconds=None, weight_bytes=None
        )
    assert steps[-1] == (9, 9) and steps == sorted(steps)


class Killed(BaseException):
    """What stands for a kill."""


@pytest.mark.parametrize("at", range(1, 8))
def test_a_pass_that_was_killed_goes_on(at: int, made: Any, tmp_path: Path) -> None:
    """Two blocks of each model, and three windows: killed after each of these, the end says the same to the digit."""
    folder, quantized = made("llama")
    base, model = Streamed.of(open_source(folder)), Streamed.of(LowbitFolder(quantized))
    right = stream_quality(model, windows(), base=base)
    (tmp_path / "kept").mkdir()
    steps: list[int] = []

    def dying(done: int, total: int) -> None:
        steps.append(total)
        if len(steps) == at:
            os.sync()
            raise Killed

    with pytest.raises(Killed):
        stream_quality(model, windows(), base=base, kept=Kept(tmp_path / "kept"), progress=dying)
    again: list[int] = []
    found = stream_quality(
        model, windows(), base=base, kept=Kept(tmp_path / "kept"), progress=lambda done, total: again.append(total)
    )
    assert found == right
    assert not again or again[0] < 7 or at == 1


@pytest.mark.parametrize("room", [0, 10**12])
@pytest.mark.parametrize("budget", [None, 600.0])
def test_an_evaluation_that_was_killed_goes_on(
    room: int, budget: float | None, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "ROOM", room)
    folder, quantized = made("llama-tied")
    how = HOW | {"prompt": "the cat", "budget": budget}
    right = lowbit.evaluate(quantized, folder, **how)
    place, count = tmp_path / "kept", [0]
    real = Kept.add

    def dying(self: Kept, index: int, figures: Any) -> None:
        real(self, index, figures)
        count[0] += 1
        if count[0] == 2:
            raise Killed

    monkeypatch.setattr(Kept, "add", dying)
    with pytest.raises(Killed) as killed:
        lowbit.evaluate(quantized, folder, keep=place, **how)
    assert any("goes on from there" in note for note in killed.value.__notes__) and place.is_dir()
    monkeypatch.setattr(Kept, "add", lambda self, index, figures: count.append(index) or real(self, index, figures))
    found = lowbit.evaluate(quantized, folder, keep=place, **how)
    assert count[1:] == [2] and not place.exists()
    assert (found.quality, found.sample, found.text) == (right.quality, right.sample, right.text)


def test_what_is_kept_of_another_measurement_does_not_count(made: Any, tmp_path: Path, no_room: None) -> None:
    folder, quantized = made("llama-tied")
    place = tmp_path / "kept"
    place.mkdir()
    (place / "about.json").write_text('{"lowbit_measuring": 1, "model": "another"}')
    (place / "window-000000.npz").write_bytes(b"no figures")
    assert (
        lowbit.evaluate(quantized, folder, keep=place, **HOW).quality
        == lowbit.evaluate(quantized, folder, **HOW).quality
    )
    with pytest.raises(RecipeError, match="models in files"):
        lowbit.evaluate(open_source(folder).load_float(), keep=place, tokenizer=open_source(folder).tokenizer(), **HOW)


KILLED = """
import os, signal, sys
import lowbit
from lowbit.measure.kept import Kept
from lowbit.planning import measuring
measuring.ROOM = 0
real, count = Kept.add, [0]

def dying(self, index, figures):
    real(self, index, figures)
    count[0] += 1
    if count[0] == 2:
        os.kill(os.getpid(), signal.SIGKILL)

Kept.add = dying
folder, quantized, place, text = sys.argv[1:]
lowbit.evaluate(quantized, folder, [text], windows=3, length=40, keep=place)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_process_that_was_killed_leaves_what_the_next_goes_on_from(made: Any, tmp_path: Path, no_room: None) -> None:
    folder, quantized = made("llama-tied")
    place = tmp_path / "kept"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, (folder, quantized, place)), TEXT[0]], capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr
    assert len(list(place.glob("window-*.npz"))) == 2 and (place / "model").is_dir()
    steps: list[int] = []
    found = lowbit.evaluate(quantized, folder, keep=place, progress=lambda done, total: steps.append(total), **HOW)
    assert steps == [1]  # of both models' blocks and three windows, one window was left
    assert found.quality == lowbit.evaluate(quantized, folder, **HOW).quality and not place.exists()
