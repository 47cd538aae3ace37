"""llama.cpp beside lowbit: its own tools quantize, and gguf-py reads what they wrote.

    python benchmarks/peers/llama_peer.py MODEL CALIBRATION OUT [--config Q4_K_M-im] [--work FOLDER] [--pre gpt-2]

A config is a type of llama-quantize; with `-im` after it, llama-imatrix sees the calibration windows first.
--work keeps the float GGUF and the importance matrix for the next config; their seconds are counted each time.
--pre names the pre-tokenizer of a model whose tokenizer llama.cpp's converter does not know.
The programs are looked for beside this Python, then on the PATH.
"""

from __future__ import annotations

import collections
import difflib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

# The converter knows tokenizers by a hash of what they make of a text; a new one it refuses, to be named in its code.
_CONVERT_AS = """
import pathlib, runpy, sys
pre, script = sys.argv[1:3]
sys.path.insert(0, str(pathlib.Path(script).parent))
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""


def tool(name: str) -> Path:
    beside = str(Path(sys.executable).parent)
    if found := shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")])):
        return Path(found).resolve()  # the converter looks for its modules beside itself, not beside a link to it
    raise SystemExit(f"{name} is neither beside {sys.executable} nor on the PATH: README.md says how to build it")


def kept(work: Path, file: str, key: str, make: Any) -> tuple[Path, dict[str, Any]]:
    """A file of `work` and what making it cost; made unless it is there, of the same `key`."""
    path, record = work / file, work / f"{file}.json"
    if path.exists() and record.exists():
        cost = json.loads(record.read_text())
        if cost["key"] == key:
            return path, cost
    cost = {**make(path), "key": key}
    record.write_text(json.dumps(cost))
    return path, cost


def tokens_alike(gguf_file: Path, text: Path, rows: list[list[int]]) -> float:
    """llama.cpp tokenises for itself: the share of its calibration tokens that are also, in this order, in `rows`.

    Runs of blanks may come out differently; anything more would be another calibration.
    """
    command = [tool("llama-tokenize"), "-m", gguf_file, "-f", text, "--ids", "--no-parse-special", "--log-disable"]
    printed = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout
    ours = [i for row in rows for i in row]
    theirs = json.loads(printed[printed.index("[") :])[: len(ours)]
    blocks = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
    alike = sum(block.size for block in blocks) / len(ours)
    if alike < 0.999:
        raise SystemExit(f"llama.cpp tokenises {text} differently: only {alike:.2%} of the tokens are the same")
    return alike


def read(gguf_file: Path) -> tuple[float, dict[str, int]]:
    """Bits per weight of the matrices of the blocks, and how many of them have each type."""
    import gguf

    bits, weights, types = 0, 0, collections.Counter()
    for tensor in gguf.GGUFReader(gguf_file).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            bits, weights = bits + 8 * int(tensor.n_bytes), weights + int(tensor.n_elements)
            types[tensor.tensor_type.name] += 1
        elif tensor.name in {"token_embd.weight", "output.weight"}:
            types[f"{tensor.name.removesuffix('.weight')} {tensor.tensor_type.name}"] += 1
    return bits / weights, dict(types)


def dequantized(gguf_file: Path) -> dict[str, Any]:
    """float32 tensors by their Hugging Face names; transformers undoes what the conversion permuted."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def version() -> str:
    printed = subprocess.run([str(tool("llama-imatrix")), "--version"], capture_output=True, text=True)
    found = re.search(r"version: (\S+)", printed.stdout + printed.stderr)
    return found[1] if found else f"beside gguf {importlib.metadata.version('gguf')}"


def quantize(arguments: Any, work: Path) -> common.Result:
    kind, _, rest = arguments.config.partition("-")
    if rest not in {"", "im"}:
        raise SystemExit(f"config {arguments.config!r}: a type of llama-quantize, or the same and -im")
    model, text, threads = arguments.model, arguments.calibration, os.cpu_count() or 1
    digest = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    source = digest.hexdigest()
    steps: common.Steps = {}
    details: dict[str, Any] = {}
    program = [sys.executable, *(["-c", _CONVERT_AS, arguments.pre] if arguments.pre else [])]
    convert = [*program, tool("convert_hf_to_gguf.py"), model, "--outtype", "f32", "--outfile"]
    whole, steps["convert"] = kept(work, "float32.gguf", source, lambda path: common.run([*convert, path], work))
    quantizer, calibration = [tool("llama-quantize")], None
    if rest == "im":
        rows = common.windows(model, text, arguments.windows, arguments.length)
        calibration = common.mark(rows)
        details["tokens_alike"] = tokens_alike(whole, text, rows)
        program = [tool("llama-imatrix"), "-m", whole, "-f", text, "-c", arguments.length, "-b", arguments.length]
        program += ["--chunks", arguments.windows, "--no-ppl", "-ngl", 0, "-t", threads, "-o"]
        key = f"{source} {calibration}"
        matrix, steps["imatrix"] = kept(work, "imatrix.gguf", key, lambda path: common.run([*program, path], work))
        quantizer += ["--imatrix", matrix]
    file = arguments.out / f"{arguments.config}.gguf"
    steps["quantize"] = common.run([*quantizer, whole, file, kind, threads], work)
    linear_bits, details["types"] = read(file)
    tensors = dequantized(file)
    common.write_weights(model, arguments.out / common.WEIGHTS, tensors)
    size = file.stat().st_size
    if arguments.gguf:
        shutil.move(file, arguments.gguf)
    else:
        file.unlink()
    return common.Result(
        peer="llama.cpp",
        version=version(),
        config=arguments.config,
        peak_resident_bytes=max(step["peak"] for step in steps.values()),
        file_bytes=size,
        parameters=sum(t.numel() for t in tensors.values()),
        linear_bits=linear_bits,
        steps=steps,
        calibration=calibration,
        weights=common.WEIGHTS,
        details=details,
        notes=["of the weights alone: where llama.cpp runs them it rounds activations to 8 bits too"],
    )


def main() -> None:
    made = common.parser(__doc__, "Q4_K_M-im")
    kept_in = os.environ.get("LLAMA_PEER_WORK")
    made.add_argument(
        "--work",
        type=Path,
        default=kept_in and Path(kept_in),
        help="folder that keeps the float GGUF and the importance matrix (default: the variable LLAMA_PEER_WORK)",
    )
    made.add_argument(
        "--pre", help="llama.cpp's name of the pre-tokenizer, such as gpt-2, where its converter knows none"
    )
    made.add_argument("--gguf", type=Path, help="keep the quantized file under this name (default: it is removed)")
    arguments = made.parse_args()
    common.fresh(arguments.out)
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
        result = quantize(arguments, arguments.work)
    else:
        with tempfile.TemporaryDirectory(dir=arguments.out) as work:
            result = quantize(arguments, Path(work))
    common.finish(result, arguments)


if __name__ == "__main__":
    main()
