"""KV caches by bits: KL from the float cache by position, and facts found; beside transformers' backends and llama.cpp's types.

    python benchmarks/kv_cache.py MODEL EVAL --out benchmarks/results/kv-cache.json
        [--context 2048 --windows 2] [--rows ours transformers llama auto] [--label smollm2]
        [--gguf FILE --llama PROGRAM]        # peers/llama_cache.cpp, built, and the same weights for it
        [--only NAME ...] [--again]

Every cache is measured beside the float cache of the same program: windows of one text, KL(float || cache) in nats per token by
tenths of the context, facts asked at its end. float32 arithmetic. transformers' rows need optimum-quanto and hqq in this environment
(peers/transformers_cache.py). `auto` is `lowbit check-kv` with --kl 0.01 and 0.03. Rows that are in OUT already, by label, context,
windows and name, are kept, so that a run that was stopped goes on; --again measures them anew. OUT.md is written from all rows of OUT.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from transformers_cache import BackendCache

from lowbit.calibration.text import load_text
from lowbit.interchange.opening import open_source
from lowbit.kv import CacheFormat
from lowbit.measure.environment import environment
from lowbit.measure.kv.allocate import CANDIDATES
from lowbit.measure.kv.check import Bench
from lowbit.measure.kv.drift import Drift
from lowbit.measure.kv.runner import Runner
from lowbit.measure.windows import Tokens

OURS = (
    "int8", "int8:g32", "int8:recent=32", "simquant8", "rotate@int6", "rotate+search@int5:g32", "rotate+search@int5", "int4", "int4:g32", "rotate+search@int4:g32",
    "rotate+search@int4", "search@int4:32x1", "kivi4", "kvquant4", "turboquant4", "rotate+search@int3:g32", "kvquant3", "turboquant3",
    "rotate+search@int5:recent=32", "rotate+search@int4:recent=32", "rotate+norm@normal4:recent=32",
    "rotate+search@int3:recent=32", "rotate+search@int2:g32:recent=64",
    "rotate+search@int2:g32", "kivi2", "kvquant2", "turboquant2",
)  # fmt: skip
THEIRS = (("fp8", 8), ("hqq", 8), ("quanto", 4), ("hqq", 4), ("quanto", 2), ("hqq", 2))
LLAMA = {"q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5, "iq4_nl": 4.5}
LIMITS = (0.01, 0.03)


def figures(drift: Drift) -> dict[str, Any]:
    """KL, top-1 and perplexity ready for JSON."""
    return {
        "kl": drift.kl.value, "kl_stderr": drift.kl.stderr, "top1": drift.mean("top1").value,
        "perplexity": drift.perplexity().value, "base_perplexity": drift.perplexity("base_nll").value,
        "deciles": [{"kl": d.kl.value, "stderr": d.kl.stderr} for d in drift.deciles()],
    }  # fmt: skip


def ours(bench: Bench, text: str) -> dict[str, Any]:
    """A cache format of lowbit."""
    fmt = CacheFormat.of(text)
    (row,) = bench.rows({text: bench.cache(fmt)})
    return from_row(row)


def from_row(row: Any) -> dict[str, Any]:
    deciles = [{"kl": d.kl.value, "stderr": d.kl.stderr} for d in row.deciles]
    again = row.repetition
    return {
        "bits": row.bits, "k_bits": row.k_bits, "v_bits": row.v_bits, "format": row.format, "kl": row.kl.value,
        "kl_stderr": row.kl.stderr, "top1": row.top1.value, "perplexity": row.perplexity.value, "deciles": deciles,
        "found": row.found, "base_found": row.base_found, "asked": row.asked,
        "repeat_loss": again and again.loss.value, "base_repeat_loss": again and again.base_loss.value,
    }  # fmt: skip


def backend(bench: Bench, name: str, bits: int) -> dict[str, Any]:
    """A backend of transformers' QuantizedCache."""
    cache = BackendCache(name, bits)
    ((drift, facts, again),) = bench.measure([cache])
    return {"bits": cache.average_bits(bench.windows.length), "stored_bits": cache.stored_bits} | figures(drift) | {
        "found": sum(d.found for d in facts), "base_found": sum(d.base_found for d in facts), "asked": sum(d.asked for d in facts),
        "repeat_loss": again and again.loss.value, "base_repeat_loss": again and again.base_loss.value,
    }  # fmt: skip


def llama(bench: Bench, kind: str, program: str, gguf: str) -> dict[str, Any]:
    """A type of llama.cpp's cache, for keys and values, against its own f16 cache."""
    ids = bench.windows.ids
    with tempfile.TemporaryDirectory() as room:
        tokens, out = Path(room) / "ids", Path(room) / "out"
        tokens.write_bytes(ids.numpy().astype("<i4").tobytes())
        command = [program, gguf, str(tokens), str(ids.shape[1]), kind, kind, str(out), str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"error": done.stderr.strip().splitlines()[-1], "bits": LLAMA[kind]}
        found = np.fromfile(out, "<f4").reshape(len(ids), -1, 4).astype(np.float64)
    names = ("base_nll", "nll", "kl", "top1")
    drift = Drift({name: found[..., i] for i, name in enumerate(names)})
    return {"bits": LLAMA[kind], "stored_bits": LLAMA[kind]} | figures(drift)


def auto(bench: Bench, limit: float) -> dict[str, Any]:
    """What check-kv recommends."""
    if not hasattr(bench, "found_sensitivity"):
        bench.found_sensitivity = bench.sensitivity(CANDIDATES)  # type: ignore[attr-defined]
    found = bench.recommend(bench.found_sensitivity, limit)  # type: ignore[attr-defined]
    assert found.figures is not None, f"nothing holds a KL of {limit}"
    return from_row(found.figures) | {"trials": found.trials, "limit": limit}


def plans(bench: Bench, arguments: argparse.Namespace) -> dict[str, tuple[str, Callable[[], dict[str, Any]]]]:
    """Name -> (program, what measures it)."""
    found: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {}
    for text in OURS if "ours" in arguments.rows else ():
        found[text] = ("lowbit", lambda text=text: ours(bench, text))
    for name, bits in THEIRS if "transformers" in arguments.rows else ():
        found[f"{name} {bits}"] = ("transformers", lambda name=name, bits=bits: backend(bench, name, bits))
    for kind in LLAMA if "llama" in arguments.rows else ():
        found[kind] = ("llama.cpp", lambda kind=kind: llama(bench, kind, arguments.llama, arguments.gguf))
    for limit in LIMITS if "auto" in arguments.rows else ():
        found[f"kv=auto, KL {limit:g}"] = ("lowbit", lambda limit=limit: auto(bench, limit))
    return {name: plan for name, plan in found.items() if not arguments.only or name in arguments.only}


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table for each model and context, most bits first."""
    parts = []
    for label, context, windows in sorted({(r["label"], r["context"], r["windows"]) for r in rows}):
        mine = [r for r in rows if (r["label"], r["context"], r["windows"]) == (label, context, windows)]
        parts += [
            f"### {label}, {windows} window{'s' * (windows > 1)} of {context} tokens", "",
            "| cache | program | bits | KL | ± | 1st tenth | 5th | 10th | worst | top-1 % | facts | float's |",
            "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
        ]  # fmt: skip
        for r in sorted(mine, key=lambda r: (-r["bits"], r.get("kl", 0))):
            if "error" in r:
                parts.append(f"| {r['name']} | {r['program']} | {r['bits']:.2f} | {r['error']} | | | | | | | | |")
                continue
            kls = [d["kl"] for d in r["deciles"]]
            facts = f"{r['found']}/{r['asked']} | {r['base_found']}" if r.get("asked") else "- | -"
            name = f"`{r['name']}`" if r["program"] == "lowbit" else r["name"]
            parts.append(
                f"| {name} | {r['program']} | {r['bits']:.2f} | {r['kl']:.5f} | {r['kl_stderr'] or 0:.5f} | {kls[0]:.5f} | {kls[4]:.5f} | "
                f"{kls[-1]:.5f} | {max(kls):.5f} | {100 * r['top1']:.2f} | {facts} |"
            )
        parts += ["", *auto_lines(mine)]
    return "\n".join(parts)


def auto_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The formats that were chosen."""
    chosen = [r for r in rows if r["name"].startswith("kv=auto")]
    return [line for r in chosen for line in (f"{r['name']}: `{r['format']}`", "")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("evaluation")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--rows", nargs="*", default=["ours", "transformers", "auto"])
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--label", default="SmolLM2-135M-Instruct, shuffled")
    parser.add_argument("--gguf")
    parser.add_argument("--llama")
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    if "llama" in arguments.rows and not (arguments.gguf and arguments.llama):
        raise SystemExit("llama.cpp's rows need --gguf and --llama")
    source = open_source(arguments.model)
    model = source.load_float(torch.float32)
    tokens = Tokens.of(load_text(arguments.evaluation), source.tokenizer(), model)
    cut = tokens.windows(arguments.context, arguments.windows)
    bench = Bench(Runner(model), cut, tokens, source.tokenizer())
    told = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
    mark = {"label": arguments.label, "context": cut.length, "windows": cut.count}

    def same(row: dict[str, Any], name: str, program: str) -> bool:
        return all(row[k] == v for k, v in {**mark, "name": name, "program": program}.items())

    for name, (program, measure) in plans(bench, arguments).items():
        if any(same(r, name, program) for r in told["rows"]) and not arguments.again:
            continue
        begin, cpu = time.time(), time.process_time()
        row = {**mark, "name": name, "program": program, **measure()}
        row |= {"seconds": round(time.time() - begin, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        known = (
            json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
        )  # others may have written
        told = {
            "environment": asdict(environment()),
            "rows": [r for r in known["rows"] if not same(r, name, program)] + [row],
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(told, indent=1, default=str) + "\n")
        said = f"KL {row['kl']:.5f}" if "kl" in row else row["error"]
        print(
            time.strftime("%H:%M:%S"),
            name,
            program,
            f"{row['bits']:.2f} bits",
            said,
            f"{row['cpu_seconds']} s",
            file=sys.stderr,
            flush=True,
        )
    table = markdown(told["rows"])
    page = arguments.out.with_suffix(".md")
    if page.exists() and (found := re.search(r"(?s)<!-- rows -->.*", page.read_text())):
        page.write_text(page.read_text().replace(found[0], f"<!-- rows -->\n\n{table}\n"))
    else:
        page.write_text(f"<!-- rows -->\n\n{table}\n")


if __name__ == "__main__":
    main()
