"""Which programs read what lowbit writes: every folder is loaded by them, without lowbit, and compared with lowbit's own.

    python benchmarks/foreign_readers.py TEXT --folder LOWBIT_FOLDER... --work DIR \
        --out benchmarks/results/foreign-readers.json --python transformers=ENV/bin/python \
        --python gptqmodel=ENV/bin/python --python vllm=ENV/bin/python --python lm-eval=ENV/bin/python

Each environment has the program and not lowbit, but for lm-eval's, which has both. A reader without `--python` is left out.
The folders carry the first table, the first one in every target that can hold it, the others as vllm. A tiny random Llama, made
here, carries the second, with every way of storing; without `--folder` it is asked about alone. What is in DIR from an earlier run
is taken as it is, and records in OUT stay until they are measured anew. Reference: `lowbit.load` in float32, weights expanded, inputs rounded as the recipe says. Logits:
|a - b| / |b| over all tokens of the rows; of vLLM, which gives log-probabilities of the next token, each row's mean taken off both.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowbit
from lowbit.errors import ExportError
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from readers import tables

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "interchange")]

from foreign_programs import ReaderFailed, apart, asked, error_of, read, wide_llama  # noqa: E402
from gguf_models import save_model  # noqa: E402

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
FOLDERS = re.compile(r"(?<![\w/])/(?:[^\s/'\"]+/)+")  # of absolute paths in an error, which are this machine's business
NAMES = ("reader", "target", "recipe", "folder")  # what tells records of one table apart
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

    def rounding(self, rows: Tensor) -> float | None:
        """What rounding the inputs changes of lowbit's own logits, |a - b| / |b|: the size of what readers may do otherwise."""
        if not any(t.inputs is not None for t in LowbitFolder(self.ours).contents.tensors.values()):
            return None
        model = LowbitFolder(self.ours).dense().load_float()
        with torch.inference_mode():
            return apart(self.logits, model(input_ids=rows).logits)


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


def answers(python: str, script: str, rows: Tensor, work: Path, names: list[str]) -> list[Any]:
    """What a script says of each DTYPE=FOLDER and what it computed, or of each why it gives nothing."""
    try:
        return read(python, script, rows, work / "read", *names)
    except ReaderFailed as error:
        return [({"error": str(error)}, {})] * len(names)


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
        static: dict[str, Any] = {"calibration": "self", "samples": 2, "length": 128} if "a=minmax@" in recipe else {}
        if not ours.exists():
            lowbit.quantize(model, recipe + ",embed=keep", ours, **static)
        yield replace(exported(ours, target, rows), recipe=recipe), vllm


def ask_all(cases: list[Case], vllm: list[Case], rows: Tensor, pythons: dict[str, str], work: Path) -> Iterator[Any]:
    """A record for each case and reader: transformers' of all its cases in one process, vLLM's in one each."""
    for reader in ("transformers", "gptqmodel"):
        mine = [case for case in cases if READERS[case.target] == reader]
        if reader in pythons and mine:
            names = [f"{_dtype(case, reader)}={case.theirs}" for case in mine]
            found = answers(pythons[reader], "transformers_reader.py", rows, work, names)
            yield from (_record(case, reader, one, rows) for case, one in zip(mine, found))
    for case in vllm if "vllm" in pythons else ():
        (one,) = answers(pythons["vllm"], "vllm_reader.py", rows, work, [f"auto={case.theirs}"])
        yield _record(case, "vllm", one, rows)


def _dtype(case: Case, reader: str) -> str:
    return "float16" if reader == "gptqmodel" else DTYPES.get(case.recipe, "float32")


def _record(case: Case, reader: str, answer: tuple[dict[str, Any], dict[str, Tensor]], rows: Tensor) -> dict[str, Any]:
    """What one reader made of a case: the error, and how many tokens up to the first difference of each row are the same."""
    said, found = answer
    record = {"reader": reader, "target": case.target, "recipe": case.recipe, "export": case.said} | said
    if "error" in said:
        record["error"] = FOLDERS.sub("", said["error"])
    else:
        same = (found["tokens"] == case.tokens).long().cumprod(1)
        record |= {"logits": error_of(found, case.logits), "tokens": int(same.sum()), "of": same.numel()}
        record["rounding"] = case.rounding(rows)
    print(json.dumps(record), file=sys.stderr, flush=True)
    return record


def _last(python: str, script: str, *arguments: Any) -> dict[str, Any]:
    """The last line that a script prints, or the error."""
    try:
        return asked(python, script, *arguments)[-1]
    except ReaderFailed as error:
        return {"error": FOLDERS.sub("", str(error))}


def served(folder: Path, ours: Path, pythons: dict[str, str]) -> dict[str, Any]:
    """vLLM's server asked through the `openai` client, beside lowbit's own greedy text."""
    found = _last(pythons["vllm"], "openai_client.py", folder, PROMPT, "--tokens", NEW)
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

    found = _last(python, "lm_eval_reader.py", ours, text)
    piece = text.read_text("utf-8")[:2000]
    tokenizer, model = AutoTokenizer.from_pretrained(ours), lowbit.load(ours, torch.float32, kernel="expand")
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(piece, add_special_tokens=False)["input_ids"]]])
    with torch.inference_mode():
        scores = model(input_ids=ids[:, :-1]).logits.float().log_softmax(-1)
    nats = -float(scores[0].gather(1, ids[0, 1:, None]).double().sum())
    return found | {"own": nats / math.log(2) / len(piece.encode()), "folder": ours.name}


class Report:
    """What is known so far, as JSON and as tables; records of an earlier run stay until they are measured anew."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
        self.found |= {"lowbit": lowbit.__version__, "rows": [ROWS, LENGTH, NEW]}

    def keep(self, key: str, record: dict[str, Any]) -> None:
        """Put a record in the place of the one of the same reader, target and recipe, or at the end, and write."""
        records = self.found.setdefault(key, [])
        same = [i for i, old in enumerate(records) if all(old.get(k) == record.get(k) for k in NAMES)]
        at = same[0] if same else len(records)
        records[at : at + 1] = [record]
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.found, indent=1) + "\n")
        self.out.with_suffix(".md").write_text(tables.markdown(self.found))


def on_folders(folders: list[Path], text: Path, pythons: dict[str, str], work: Path, report: Report) -> None:
    """The first in every target, the others as vllm; then the server, and lm-eval on the first."""
    rows = rows_of(folders[0], text)
    cases = list(of_folder(folders[0], READERS, rows, work))
    cases += [case for folder in folders[1:] for case in of_folder(folder, ["vllm"], rows, work)]
    for record in ask_all(cases, cases, rows, pythons, work):
        report.keep("on_model", record)
    for case in cases if "vllm" in pythons else ():
        if case.target == "vllm":
            report.keep("served", {"recipe": case.recipe} | served(case.theirs, case.ours, pythons))
    if "lm-eval" in pythons:
        report.keep("harness", harness(folders[0], text, pythons["lm-eval"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--folder", type=Path, action="append", default=[])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--python", action="append", default=[], metavar="READER=PYTHON")
    given = parser.parse_args()
    pythons = dict(item.split("=", 1) for item in given.python)
    given.work.mkdir(parents=True, exist_ok=True)
    report = Report(given.out)
    if given.folder:
        on_folders(given.folder, given.text, pythons, given.work, report)
    small = given.work / "tiny-llama"
    save_model(wide_llama(256), small)
    rows = rows_of(small, given.text)
    pairs = list(of_tiny(small, rows, given.work))
    for record in ask_all([c for c, _ in pairs], [c for c, vllm in pairs if vllm], rows, pythons, given.work):
        report.keep("on_tiny", record)


if __name__ == "__main__":
    main()
