"""bench: what is measured in which order, what figures are made of, what is refused. Never how fast anything is."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_models import build_model
from typer.testing import CliRunner

import lowbit
from lowbit.cli.main import app
from lowbit.errors import EngineError, LowbitError, RecipeError, SourceError
from lowbit.kernels.core import core
from lowbit.measure import backends as backends
from lowbit.measure import bench as module
from lowbit.measure.backends import Backend
from lowbit.measure.bench import Bench, BenchRow, Limits
from lowbit.measure.interleave import SpeedSettings, interleave
from lowbit.measure.peers.line_program import run_by_lines
from lowbit.measure.startup import Startup, startup
from tiny import save_tiny

FEW = SpeedSettings(prompt=6, new=4, prefill=9, batch=2, batch_length=9)


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, float_folder: Callable[[str], Path], packed_folder: Callable[..., Path]
) -> dict[str, Path]:
    save_tiny("gpt2", tmp_path_factory.mktemp("bench") / "gpt2")
    return {
        "float": float_folder("llama-tied"), "w4": packed_folder("llama-tied", "int4:g32"), "untied": float_folder("llama"),
        "gpt2": tmp_path_factory.getbasetemp() / "bench0" / "gpt2",
    }  # fmt: skip


@pytest.fixture
def llama_bench(tmp_path: Path) -> tuple[Path, Path]:
    """A program that notes how it was called, and answers as llama-bench does; a GGUF file."""
    program, notes = tmp_path / "llama-bench", tmp_path / "notes"
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\nopen({str(notes)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "print(json.dumps([{'avg_ts': 12.5}]))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program, notes


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for name, shape in (("token_embd.weight", (10, 8)), ("output.weight", (10, 8)), ("blk.0.attn_q.weight", (8, 8))):
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def test_every_program_is_measured_on_one_figure_before_the_next_and_the_first_round_is_thrown_away() -> None:
    record: list[str] = []

    def probe(name: str) -> Any:
        def call() -> float:
            record.append(name)
            return float(len(record))

        return call

    programs = [{"decode": probe("a d"), "prefill": probe("a p")}, {"decode": probe("b d")}]
    moved: list[tuple[int, int]] = []
    found = interleave(programs, 2, lambda *at: moved.append(at), lambda: record.append("machine"))
    assert record == ["machine", "a d", "b d", "a p"] * 3
    assert found == [{"decode": [6.0, 10.0], "prefill": [8.0, 12.0]}, {"decode": [7.0, 11.0]}]
    assert moved == [(i, 9) for i in range(1, 10)]


def test_figures_are_made_of_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([9.0, 9.0, 1.0, 10.0, 3.0, 30.0, 2.0, 20.0])

    def opened(*_: Any) -> Backend:
        return Backend(
            "a", lambda s: {name: lambda: next(values) for name in ("decode", "prefill")}, 100, lambda n: n * 7 + 2, 40
        )

    monkeypatch.setattr(module, "_engine_or_transformers", opened)
    limits = {"read_bytes_per_second": 1000.0, "int8_products_per_second": 288.0}
    seen = iter([{key: value * k for key, value in limits.items()} for k in (0.5, 1.0, 0.1, 0.7)])
    monkeypatch.setattr(module._Machine, "look", lambda self: self.found.append(next(seen)))
    found = lowbit.bench("x", rounds=3, threads=1)
    (row,) = found.rows
    assert row.values == {"decode": [1.0, 3.0, 2.0], "prefill": [10.0, 30.0, 20.0]}
    assert row.median("decode") == 2.0 and row.median("batch") is None
    assert found.settings.prompt + found.settings.new <= 40 and found.settings.prefill == 39
    assert found.limits == Limits(1000.0, 288.0)
    assert row.read_share == 0.2 and row.product_share == pytest.approx(20 / 39 * (39 * 7 + 2) / 288)


def test_the_engine_transformers_and_llama_cpp(
    folders: dict[str, Path], llama_bench: tuple[Path, Path], gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    starts = iter(Startup(float(n), n, 2 * n, 3 * n) for n in (9, 9, 9, 3, 4, 5, 1, 6, 7))

    def start(*how: Any) -> Startup:
        opened.append(how)
        return next(starts)

    monkeypatch.setattr(backends, "startup", start)
    program, notes = llama_bench
    found = lowbit.bench(
        folders["w4"], beside=folders["float"], gguf=gguf, llama_bench=str(program), activations=["exact", "int8"],
        threads=1, rounds=2, settings=FEW,
    )  # fmt: skip
    assert [row.name for row in found.rows] == [
        "lowbit llama-tied, exact activations", "lowbit llama-tied, int8 activations", "transformers llama-tied, float32",
        "llama.cpp tiny",
    ]  # fmt: skip
    for row in found.rows:
        names = ["decode", "prefill"] + ["batch", "first_token"] * (not row.name.startswith("llama.cpp"))
        assert list(row.values) == names and all(len(values) == 2 for values in row.values.values())
        assert all(value > 0 for values in row.values.values() for value in values) and row.read_share > 0
    first = found.rows[0]
    assert first.values["first_token"] == [3.0, 1.0] and first.startup.seconds == 3.0  # type: ignore[union-attr]
    shared = {"model": str(folders["w4"]), "threads": 1}
    assert opened[:3] == [
        ("engine", {**shared, "activations": "exact"}), ("engine", {**shared, "activations": "int8"}),
        ("transformers", {"model": str(folders["float"]), "dtype": "float32"}),
    ]  # fmt: skip
    engine, theirs = lowbit.Engine.open(folders["w4"]), found.rows[-1]
    assert found.rows[0].weight_bytes == engine.describe().packed_bytes  # tied: a token reads all
    assert theirs.weight_bytes == 4 * (80 + 64 + 8) and theirs.median("decode") == 12.5
    called = notes.read_text().splitlines()
    shared = f"-m {gguf} -t 1 -ngl 0 -r 1 -o json"
    assert called == [f"{shared} -p 0 -n 4 -d 6", f"{shared} -p 9 -n 0"] * 3
    assert found.threads == 1 and found.isa == core().isas()[0]  # type: ignore[union-attr]
    json.dumps(found.to_dict())
    assert found.to_markdown().count("\n| lowbit llama-tied") == 2


def test_what_a_token_reads_and_multiplies(folders: dict[str, Path]) -> None:
    engine = lowbit.Engine.open(folders["untied"])
    told = engine.describe()
    model = build_model("llama")
    assert told.packed_bytes - told.bytes_per_token >= model.model.embed_tokens.weight.nbytes
    assert told.bytes_per_token >= 4 * engine.shape.products(1, 1)
    layers = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2)
    assert engine.shape.products(5, 2) == 5 * layers + 2 * model.lm_head.weight.numel()


def test_a_model_that_the_engine_does_not_know_is_run_by_transformers_which_is_said(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "startup", lambda *how: Startup(1.0, 1, 2, 3))
    found = lowbit.bench(folders["gpt2"], rounds=1, settings=FEW)
    assert found.rows[0].name == "transformers gpt2, float32" and "models of type 'gpt2'" in found.rows[0].note
    assert "models of type 'gpt2'" in found.to_markdown()
    with pytest.raises(EngineError, match="without activations"):
        lowbit.bench(folders["gpt2"], rounds=1, settings=FEW, activations="int8")


def test_models_in_memory(folders: dict[str, Path]) -> None:
    found = lowbit.bench([build_model("llama")], beside=build_model("llama").bfloat16(), rounds=1, settings=FEW)
    assert [row.name for row in found.rows] == [
        "lowbit LlamaForCausalLM", "transformers LlamaForCausalLM, bfloat16",
    ]  # fmt: skip
    assert all("first_token" not in row.values and row.startup is None for row in found.rows)
    model = build_model("llama").bfloat16()
    read = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    assert found.rows[1].weight_bytes == 2 * read + sum(b.nbytes for b in model.buffers())


@pytest.mark.parametrize("what", ["engine", "transformers"])
def test_the_first_token_of_a_fresh_process(what: str, folders: dict[str, Path]) -> None:
    arguments = {"threads": 1} if what == "engine" else {"dtype": "bfloat16"}
    found = startup(what, {"model": str(folders["w4"]), **arguments})
    assert 0 < found.imported <= found.resident <= found.peak and found.seconds > 0


def test_what_cannot_be_is_an_error_before_anything_is_measured(
    folders: dict[str, Path], tmp_path: Path, gguf: Path, llama_bench: tuple[Path, Path]
) -> None:
    w4 = folders["w4"]
    for options, error, words in (
        ({"rounds": 0}, RecipeError, "rounds=0"),
        ({"threads": 0}, RecipeError, "threads=0"),
        ({"dtype": "int7"}, RecipeError, "int7"),
        ({"dtype": "bfloat16"}, RecipeError, "dtype=bfloat16 would be ignored"),
        ({"dtype": "bfloat16", "beside": build_model("llama")}, RecipeError, "dtype=bfloat16 would be ignored"),
        ({"activations": []}, RecipeError, "no activations"),
        ({"llama_bench": str(llama_bench[0])}, RecipeError, "without a GGUF file"),
        ({"gguf": tmp_path / "none.gguf"}, SourceError, "no such GGUF file"),
        ({"gguf": gguf, "llama_bench": str(tmp_path / "none")}, RecipeError, "no such program"),
        ({"beside": tmp_path / "none"}, SourceError, "none"),
    ):
        with pytest.raises(error, match=words):
            lowbit.bench(w4, **options)
    with pytest.raises(RecipeError, match="did you mean 'int8'"):
        lowbit.bench(w4, activations="int")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(SourceError, match="GGUF file"):
        lowbit.bench(w4, gguf=broken, llama_bench=str(llama_bench[0]))


def test_a_llama_bench_that_fails_is_an_error_with_its_words(tmp_path: Path, gguf: Path, folders: Any) -> None:
    program = tmp_path / "llama-bench"
    program.write_text("#!/bin/sh\necho 'failed to load model' >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(LowbitError, match="ended with 3: failed to load model"):
        lowbit.bench(folders["w4"], gguf=gguf, llama_bench=str(program), rounds=1, settings=FEW)


def peer(tmp_path: Path, *answers: str) -> str:
    path = tmp_path / "peer.py"
    path.write_text(f"print('ready', flush=True)\nfor a in {answers!r}:\n    input()\n    print(a, flush=True)\n")
    return f"{sys.executable} {path}"


def test_a_program_is_asked_line_by_line(tmp_path: Path) -> None:
    found = run_by_lines("peer", peer(tmp_path, "10.5", "20", "nan", "words"))
    probes = found.probes(SpeedSettings())
    assert (probes["decode"](), probes["prefill"]()) == (10.5, 20.0)
    for said in ("nan", "words"):
        with pytest.raises(LowbitError, match=f"answered '{said}' to 'batch'"):
            probes["batch"]()
    found.close()
    with pytest.raises(LowbitError, match="before it said 'ready'"):
        run_by_lines("peer", f"{sys.executable} -c pass")
    with pytest.raises(LowbitError, match="cannot be run"):
        run_by_lines("peer", str(tmp_path / "none"))
    wrong = CliRunner().invoke(app, ["bench", "x", "--program", "nothing"])
    assert wrong.exit_code == 2 and "NAME=COMMAND" in wrong.stderr


def test_the_command_prints_a_table_markdown_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    start = Startup(0.5, 100_000_000, 190_000_000, 200_000_000)
    rows = [
        BenchRow("lowbit x", {"decode": [150.0], "prefill": [1000.0], "first_token": [0.5]}, 80_000_000, 0.81, 0.45, start),
        BenchRow("other | y", {"decode": [50.25], "prefill": [99.0]}, note="slow today"),
    ]  # fmt: skip

    def bench(models: Any, **options: Any) -> Bench:
        asked.update(options, models=models)
        return Bench(rows, SpeedSettings(), 2, "a machine", "avx2", Limits(20e9, 300e9))

    monkeypatch.setattr(lowbit, "bench", bench, raising=False)
    words = ["bench", "x", "y", "--beside", "z", "--activations", "int8", "--activations", "exact", "--rounds", "7"]
    found = CliRunner().invoke(
        app,
        [
            *words,
            "--gguf",
            "f.gguf",
            "--llama-bench",
            "l",
            "--threads",
            "2",
            "--markdown",
            "--program",
            "peer = run it",
        ],
    )
    assert found.exit_code == 0, found.output
    progress = asked.pop("progress")
    assert callable(progress) and asked == {
        "models": ["x", "y"], "beside": ["z"], "programs": {"peer": "run it"}, "dtype": None, "gguf": [Path("f.gguf")], "llama_bench": "l",
        "activations": ["int8", "exact"], "cache": None, "threads": 2, "rounds": 7,
    }  # fmt: skip
    assert "| lowbit x | 150 | 81% | 1000 | 45% | 0.50 | 80 | 90 |" in found.stdout
    assert "| other \\| y | 50.2 |  | 99.0 |  |  |  |  |" in found.stdout and "slow today" in found.stdout
    assert "20.0 GB/s" in found.stdout and "a machine" in found.stdout
    table = CliRunner().invoke(app, ["bench", "x"]).stdout
    assert "lowbit x" in table and "81%" in table and "slow today" in table
    plain = json.loads(CliRunner().invoke(app, ["bench", "x", "--json"]).stdout)
    assert plain["rows"][0]["medians"] == {"decode": 150.0, "prefill": 1000.0, "first_token": 0.5}
    assert plain["limits"] == {"read": 20e9, "products": 300e9}


def test_the_command_ends_with_2_for_what_cannot_be(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["bench", str(tmp_path / "none")])
    assert found.exit_code == 2 and found.stderr.startswith("error: ") and not found.stdout
