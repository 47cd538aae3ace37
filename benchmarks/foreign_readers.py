"""Which programs read what lowbit writes: every folder is loaded by them, without lowbit, and compared with lowbit's own.

    python benchmarks/foreign_readers.py TEXT --folder LOWBIT_FOLDER... --work DIR \
        --out benchmarks/results/foreign-readers.json --python transformers=ENV/bin/python \
        --python gptqmodel=ENV/bin/python --python vllm=ENV/bin/python --python lm-eval=ENV/bin/python

Each environment has the program and not lowbit, but for lm-eval's, which has both. A reader without `--python` is left out.
The folders carry the first table, the first one in every target that can hold it, the others as vllm; what is in DIR from
an earlier run is taken as it is. A tiny random Llama, made here, the second, with every
way of storing. Reference: `lowbit.load` in float32, weights expanded, inputs rounded as the recipe says. Logits:
|a - b| / |b| over all tokens of the rows; of vLLM, which gives log-probabilities of the next token, each row's mean taken off both.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import lowbit
from lowbit.errors import ExportError
from lowbit.interchange.lowbit_folder import LowbitFolder
from readers import tables

HERE = Path(__file__).parent / "readers"
ROWS, LENGTH, NEW = 2, 32, 8
PROMPT = "The capital of France is"
# (recipe, target, whether vLLM is asked too) of the tiny model.
TINY_WAYS = (
    ("int4:g32", "vllm", False), ("minmax@uint4:g64:asym", "vllm", True), ("int4:channel", "vllm", False),
    ("int8:g64", "vllm", True), ("int8:channel", "vllm", False), ("int4:g32,a=int8:token", "vllm", True),
    ("int8:channel,a=int8:token", "vllm", False), ("int8:tensor,a=minmax@int8:tensor,fallback=never", "vllm", True),
    ("int8:channel,a=minmax@int8:tensor:asym,fallback=never", "vllm", True), ("e4m3:channel", "vllm", True),
    ("e4m3:channel,a=fp8:token", "vllm", True), ("e4m3:tensor,a=minmax@fp8:tensor,fallback=never", "vllm", False),
    ("mxfp4", "vllm", True), ("nvfp4", "vllm", True), ("mxfp8", "vllm", False),
    ("int4:g32,*.down_proj=int4:g64", "vllm", True), ("int4:g32,*.layers.0.self_attn.o_proj=keep", "vllm", False),
    ("minmax@uint4:g64:asym", "gptq", True), ("int8:g32", "gptq", True), ("int3:g32", "gptq", False), ("int2:g32", "gptq", False),
    ("minmax@uint4:g64:asym", "awq", True),
)  # fmt: skip
READERS = {"vllm": "transformers", "gptq": "gptqmodel", "awq": "gptqmodel"}
# compressed-tensors expands these to bfloat16 whatever it is asked for, and GPTQModel's kernels are for 16 bits.
DTYPES = {"mxfp4": "bfloat16", "nvfp4": "bfloat16", "mxfp8": "bfloat16"}


@dataclass(frozen=True)
class Case:
    """A folder of lowbit, what was exported of it, and lowbit's own logits and tokens."""

    recipe: str
    target: str
    ours: Path
    theirs: Path
    said: dict[str, Any]
    logits: Tensor
    tokens: Tensor

    @property
    def rounding(self) -> float | None:
        """What rounding the inputs changes of lowbit's own logits, |a - b| / |b|: the size of what readers may do otherwise."""
        if not any(t.inputs is not None for t in LowbitFolder(self.ours).contents.tensors.values()):
            return None
        model = LowbitFolder(self.ours).dense().load_float()
        rows = torch.tensor(json.loads((self.ours.parent / "ids.json").read_text()))
        with torch.inference_mode():
            return apart(self.logits, model(input_ids=rows).logits)


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
    rounded = any(
        "inputs" in t
        for t in json.loads((folder / "config.json").read_text())["quantization_config"]["tensors"].values()
    )
    model = lowbit.load(folder, torch.float32, kernel="expand" if rounded else "dense")
    with torch.inference_mode():
        logits = torch.cat([model(input_ids=row[None]).logits.float() for row in rows])
        seen = rows
        for _ in range(NEW):  # row by row: a static range aside, nothing may depend on the other rows
            nearest = torch.cat([model(input_ids=row[None]).logits[:, -1].argmax(-1) for row in seen])
            seen = torch.cat([seen, nearest[:, None]], 1)
    return logits, seen[:, rows.shape[1] :]


def asked(python: str, script: str, *arguments: str) -> list[dict[str, Any]]:
    """The lines of JSON that a reader prints, or why there is none. Only lm-eval's environment is shown where lowbit is."""
    shown = dict(os.environ)
    if script != "lm_eval_reader.py":
        shown.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, str(HERE / script), *arguments], capture_output=True, text=True, check=False, env=shown
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and found:
        return found
    lines = [line for line in done.stderr.splitlines() if "Error" in line and "EngineCore" not in line]
    return [{"error": (lines or done.stderr.splitlines() or ["it ended without a word"])[-1].strip()[-300:]}]


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


def exported(ours: Path, target: str, rows: Tensor, own: tuple[Tensor, Tensor] | None = None) -> Case:
    """A case of one target. ExportError when it cannot hold the folder."""
    recipe = json.loads((ours / "config.json").read_text())["quantization_config"]["recipe"]
    theirs = ours.with_name(f"{ours.name}.{target}")
    said = {} if theirs.exists() else lowbit.export(ours, target, theirs).to_json() | {"path": theirs.name}
    return Case(recipe, target, ours, theirs, said, *(own or reference(ours, rows)))


def of_folder(folder: Path, targets: Iterable[str], rows: Tensor, work: Path) -> Iterator[Case]:
    """The cases of a folder of lowbit: those of the targets that can hold it."""
    ours = work / folder.name
    if not ours.exists():
        ours.symlink_to(folder.resolve())
    own = reference(ours, rows)
    for target in targets:
        try:
            yield exported(ours, target, rows, own)
        except ExportError as error:
            print(f"{folder.name} as {target}: {error}", file=sys.stderr)


def of_tiny(model: Path, rows: Tensor, work: Path) -> Iterator[tuple[Case, bool]]:
    """The cases of the tiny model, and whether vLLM is asked."""
    for recipe, target, vllm in TINY_WAYS:
        ours = work / "".join(c if c.isalnum() else "-" for c in f"tiny-{recipe}")
        static = {"calibration": "self", "samples": 2, "length": 128} if "a=minmax@" in recipe else {}
        if not ours.exists():
            lowbit.quantize(model, recipe + ",embed=keep", ours, **static)
        yield replace(exported(ours, target, rows), recipe=recipe), vllm


def ask_all(cases: list[Case], vllm: list[Case], rows: Tensor, pythons: dict[str, str], work: Path) -> Iterator[Any]:
    """A record for each case and reader: transformers' of all its cases in one process, vLLM's in one each."""
    ids, out = work / "ids.json", work / "read"
    ids.write_text(json.dumps(rows.tolist()))
    out.mkdir(exist_ok=True)
    for reader in ("transformers", "gptqmodel"):
        mine = [case for case in cases if READERS[case.target] == reader]
        if reader in pythons and mine:
            names = [f"{_dtype(case, reader)}={case.theirs}" for case in mine]
            found = asked(pythons[reader], "transformers_reader.py", str(ids), str(out), *names)
            yield from (
                _record(case, reader, one, out / f"{i}.safetensors") for i, (case, one) in enumerate(zip(mine, found))
            )
    for case in vllm if "vllm" in pythons else ():
        (found,) = asked(pythons["vllm"], "vllm_reader.py", str(ids), str(out), f"auto={case.theirs}")[-1:]
        yield _record(case, "vllm", found, out / "0.safetensors")


def _dtype(case: Case, reader: str) -> str:
    return "float16" if reader == "gptqmodel" else DTYPES.get(case.recipe, "float32")


def _record(case: Case, reader: str, found: dict[str, Any], out: Path) -> dict[str, Any]:
    record = {"reader": reader, "target": case.target, "recipe": case.recipe, "export": case.said} | found
    if "error" not in found:
        record |= {"rounding": case.rounding}
        record |= compared(out, case.logits, case.tokens)
    print(json.dumps(record), file=sys.stderr, flush=True)
    return record


def served(folder: Path, ours: Path, pythons: dict[str, str]) -> dict[str, Any]:
    """vLLM's server asked through the `openai` client, beside lowbit's own greedy text."""
    found = asked(pythons["vllm"], "openai_client.py", str(folder), PROMPT, "--tokens", str(NEW))[-1]
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

    found = asked(python, "lm_eval_reader.py", str(ours), str(text))[-1]
    piece = text.read_text("utf-8")[:2000]
    tokenizer, model = AutoTokenizer.from_pretrained(ours), lowbit.load(ours, torch.float32, kernel="expand")
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(piece, add_special_tokens=False)["input_ids"]]])
    with torch.inference_mode():
        scores = model(input_ids=ids[:, :-1]).logits.float().log_softmax(-1)
    nats = -float(scores[0].gather(1, ids[0, 1:, None]).double().sum())
    return found | {"own": nats / math.log(2) / len(piece.encode()), "folder": ours.name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--folder", type=Path, action="append", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--python", action="append", default=[], metavar="READER=PYTHON")
    given = parser.parse_args()
    pythons = dict(item.split("=", 1) for item in given.python)
    given.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"lowbit": lowbit.__version__, "rows": [ROWS, LENGTH, NEW], "on_model": [], "on_tiny": []}

    def keep(key: str, record: dict[str, Any]) -> None:
        """Add a record, and write what is known so far as JSON and as tables."""
        found.setdefault(key, []).append(record)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(tables.markdown(found))

    rows = rows_of(given.folder[0], given.text)
    cases = list(of_folder(given.folder[0], READERS, rows, given.work))
    cases += [case for folder in given.folder[1:] for case in of_folder(folder, ["vllm"], rows, given.work)]
    for record in ask_all(cases, cases, rows, pythons, given.work):
        keep("on_model", record)
    if "vllm" in pythons:
        for case in cases:
            if case.target == "vllm":
                keep("served", {"recipe": case.recipe} | served(case.theirs, case.ours, pythons))
    if "lm-eval" in pythons:
        keep("harness", harness(given.folder[0], given.text, pythons["lm-eval"]))
    small = tiny(given.work / "tiny-llama")
    rows = rows_of(small, given.text)
    pairs = list(of_tiny(small, rows, given.work))
    for record in ask_all([c for c, _ in pairs], [c for c, vllm in pairs if vllm], rows, pythons, given.work):
        keep("on_tiny", record)


if __name__ == "__main__":
    main()
