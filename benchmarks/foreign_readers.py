"""Which programs read what lowbit writes: every folder is loaded by them, without lowbit, and compared with lowbit's own.

    python benchmarks/foreign_readers.py MODEL TEXT --work DIR --out benchmarks/results/foreign-readers.json \
        --python transformers=ENV/bin/python --python gptqmodel=ENV/bin/python --python vllm=ENV/bin/python \
        --python lm-eval=ENV/bin/python

Each environment has the program and not lowbit, but for lm-eval's, which has both. A reader without `--python` is left out.
MODEL carries the first table; a tiny random Llama, made here, the second, with every way of storing. Reference: `lowbit.load`
in float32, weights expanded, inputs rounded as the recipe says. Logits: |a - b| / |b| over all tokens of the rows; of vLLM,
which gives log-probabilities of the next token, each row's mean taken off both. Tokens: 16 greedy ones a row.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import lowbit
from readers import tables

HERE = Path(__file__).parent / "readers"
ROWS, LENGTH, NEW = 4, 48, 16
PROMPT = "The capital of France is"
# (recipe, target) of the model, and of the tiny one.
MODEL_WAYS = (
    ("search@int4:g32", "vllm"), ("search@int4:g64", "vllm"), ("minmax@uint4:g64:asym", "vllm"),
    ("absmax@int8:channel,a=int8:token", "vllm"), ("search@int4:g32", "gptq"), ("minmax@uint4:g64:asym", "gptq"),
    ("search@int4:g32", "awq"), ("minmax@uint4:g64:asym", "awq"),
)  # fmt: skip
TINY_WAYS = (
    *MODEL_WAYS, ("int4:channel", "vllm"), ("int8:g64", "vllm"), ("int8:channel", "vllm"), ("int4:g32,a=int8:token", "vllm"),
    ("int8:tensor,a=minmax@int8:tensor,fallback=never", "vllm"),
    ("int8:channel,a=minmax@int8:tensor:asym,fallback=never", "vllm"), ("e4m3:channel", "vllm"),
    ("e4m3:channel,a=fp8:token", "vllm"), ("e4m3:tensor,a=minmax@fp8:tensor,fallback=never", "vllm"), ("mxfp4", "vllm"),
    ("nvfp4", "vllm"), ("mxfp8", "vllm"), ("int4:g32,*.down_proj=int8:channel", "vllm"),
    ("int4:g32,*.layers.0.self_attn.o_proj=keep", "vllm"), ("int8:g32", "gptq"), ("int3:g32", "gptq"), ("int2:g32", "gptq"),
)  # fmt: skip
READERS = {"vllm": ("transformers", "vllm"), "gptq": ("gptqmodel", "vllm"), "awq": ("gptqmodel", "vllm")}
# compressed-tensors expands these to bfloat16 whatever it is asked for, and GPTQModel's kernels are for 16 bits.
DTYPES = {"mxfp4": "bfloat16", "nvfp4": "bfloat16", "mxfp8": "bfloat16"}


def tiny(folder: Path) -> Path:
    """A Llama of 2 layers and 256 channels with random weights and the tokenizer of the tests."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import transformers

    from tiny import VOCAB, tiny_tokenizer

    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def rows_of(model: Path, text: Path) -> Tensor:
    """Token ids [ROWS, LENGTH] of pieces of the text."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(text.read_text("utf-8")[:100_000], add_special_tokens=False)["input_ids"]
    return torch.tensor([ids[i * 1000 : i * 1000 + LENGTH] for i in range(ROWS)])


def reference(folder: Path, rows: Tensor) -> tuple[Tensor, Tensor]:
    """lowbit's own logits float32 [rows, tokens, vocabulary] and greedy tokens [rows, NEW]."""
    model = lowbit.load(folder, torch.float32, kernel="expand")
    with torch.inference_mode():
        logits = torch.cat([model(input_ids=row[None]).logits.float() for row in rows])
        seen = rows
        for _ in range(NEW):  # row by row: a static range aside, nothing may depend on the other rows
            nearest = torch.cat([model(input_ids=row[None]).logits[:, -1].argmax(-1) for row in seen])
            seen = torch.cat([seen, nearest[:, None]], 1)
    return logits, seen[:, rows.shape[1] :]


def asked(python: str, script: str, *arguments: str) -> dict[str, Any]:
    """The last line of what a reader prints, or why there is none. Only lm-eval's environment is shown where lowbit is."""
    shown = dict(os.environ)
    if script != "lm_eval_reader.py":
        shown.pop("PYTHONPATH", None)
    done = subprocess.run([python, str(HERE / script), *arguments], capture_output=True, text=True, check=False, env=shown)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found
    lines = [line for line in done.stderr.splitlines() if "Error" in line]
    return {"error": (lines or done.stderr.splitlines() or ["it ended without a word"])[-1].strip()[-300:]}


def apart(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def compared(out: Path, logits: Tensor, tokens: Tensor) -> dict[str, Any]:
    """The logits' error, and how many rows of tokens and how many tokens up to the first difference are the same."""
    read = load_file(out)
    if "logprobs" in read:
        ours = logits[:, -1]
        error = apart(read["logprobs"] - read["logprobs"].mean(1, True), ours - ours.mean(1, True))
    else:
        error = apart(read["logits"], logits)
    same = (read["tokens"] == tokens).long().cumprod(1)
    return {"logits": error, "tokens": int(same.sum()), "of": same.numel()}


def made(model: Path, recipe: str, target: str, work: Path) -> tuple[Path, Path, dict[str, Any]]:
    """(lowbit's folder, the exported one, what the export said)."""
    name = "".join(c if c.isalnum() else "-" for c in f"{model.name}-{recipe}")
    ours, theirs = work / f"{name}.lowbit", work / f"{name}.{target}"
    static = {"calibration": "self", "samples": 2, "length": 128} if "minmax@" in recipe.partition(",")[2] else {}
    if not (ours / "lowbit.json").is_file():
        lowbit.quantize(model, recipe + ",embed=keep", ours, overwrite=True, **static)
    said = lowbit.export(ours, target, theirs, overwrite=True)
    return ours, theirs, said.to_json() | {"path": theirs.name}


def table(model: Path, ways: Any, text: Path, pythons: dict[str, str], work: Path) -> Iterator[dict[str, Any]]:
    """One record for each way of storing and each reader of it."""
    rows = rows_of(model, text)
    ids = work / f"{model.name}-ids.json"
    ids.write_text(json.dumps(rows.tolist()))
    for recipe, target in ways:
        ours, theirs, said = made(model, recipe, target, work)
        logits, tokens = reference(ours, rows)
        for reader in READERS[target]:
            if reader not in pythons:
                continue
            script = "vllm_reader.py" if reader == "vllm" else "transformers_reader.py"
            dtype = (
                "auto" if reader == "vllm" else "float16" if reader == "gptqmodel" else DTYPES.get(recipe, "float32")
            )
            out = work / "read.safetensors"
            out.unlink(missing_ok=True)
            found = asked(pythons[reader], script, str(theirs), str(ids), str(out), "--dtype", dtype)
            record = {"reader": reader, "target": target, "recipe": recipe, "export": said} | found
            if "error" not in found:
                record |= compared(out, logits, tokens)
            print(json.dumps(record), file=sys.stderr, flush=True)
            yield record


def served(folder: Path, ours: Path, pythons: dict[str, str]) -> dict[str, Any]:
    """vLLM's server asked through the `openai` client, beside lowbit's own greedy text."""
    found = asked(pythons["vllm"], "openai_client.py", str(folder), PROMPT, "--tokens", str(NEW))
    with contextlib.redirect_stdout(io.StringIO()):
        model = lowbit.load(ours, torch.float32, kernel="expand")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ours)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        for _ in range(NEW):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    own = tokenizer.decode(ids[0, -NEW:])
    return found | {"own": own, "same": found.get("text") == own, "folder": folder.name}


def harness(ours: Path, text: Path, python: str) -> dict[str, Any]:
    """lm-eval's bits per byte of a text, beside lowbit's own arithmetic."""
    from transformers import AutoTokenizer

    found = asked(python, "lm_eval_reader.py", str(ours), str(text))
    piece = text.read_text("utf-8")[:2000]
    tokenizer, model = AutoTokenizer.from_pretrained(ours), lowbit.load(ours, torch.float32, kernel="expand")
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(piece, add_special_tokens=False)["input_ids"]]])
    with torch.inference_mode():
        scores = model(input_ids=ids[:, :-1]).logits.float().log_softmax(-1)
    nats = -float(scores[0].gather(1, ids[0, 1:, None]).double().sum())
    return found | {"own": nats / math.log(2) / len(piece.encode()), "folder": ours.name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--python", action="append", default=[], metavar="READER=PYTHON")
    given = parser.parse_args()
    pythons = dict(item.split("=", 1) for item in given.python)
    given.work.mkdir(parents=True, exist_ok=True)
    small = given.work / "tiny-llama"
    shutil.rmtree(small, ignore_errors=True)
    found: dict[str, Any] = {"lowbit": lowbit.__version__, "model": given.model.name, "rows": [ROWS, LENGTH, NEW]}

    def keep() -> None:
        """What is known so far, as JSON and as a table."""
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(tables.markdown(found))

    for key, model, ways in (("on_model", given.model, MODEL_WAYS), ("on_tiny", tiny(small), TINY_WAYS)):
        found[key] = []
        for record in table(model, ways, given.text, pythons, given.work):
            found[key].append(record)
            keep()
    if "vllm" in pythons:
        found["served"] = []
        for recipe in ("search@int4:g64", "search@int4:g32", "absmax@int8:channel,a=int8:token"):
            ours, theirs, _ = made(given.model, recipe, "vllm", given.work)
            found["served"].append({"recipe": recipe} | served(theirs, ours, pythons))
            keep()
    if "lm-eval" in pythons:
        ours, _, _ = made(given.model, "search@int4:g32", "vllm", given.work)
        found["harness"] = harness(ours, given.text, pythons["lm-eval"])
        keep()


if __name__ == "__main__":
    main()
