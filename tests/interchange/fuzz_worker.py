"""Opens and reads damaged copies of model files, in a process of its own whose memory and time are bounded.

    python fuzz_worker.py FOLDER FIRST LAST

FOLDER has a folder for each model, with `model.gguf` or `model.safetensors` beside config.json. Input number i damages model
i modulo their number in a way that i decides. Printed as JSON: the numbers whose reading ended in anything but values or an
error of lowbit, with what it was, and how many of each there were.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

SECONDS, BYTES = 20, 3 << 30  # for one input; address space beyond what the imports take
ABSURD = (0, 1, 7, 0x7F, 0xFF, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


def header_end(raw: bytes) -> int:
    """Where headers end, about: most damage is done before."""
    if raw[:4] == b"GGUF":
        return max(64, raw.rfind(b".weight") + 64)
    return 8 + int.from_bytes(raw[:8], "little")


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """A copy with one to three kinds of damage."""
    data = bytearray(raw)
    end = min(header_end(raw), len(data))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.choice(
            ("bits", "bits", "cut", "number", "number", "bytes", "insert", "remove", "json", "json", "length")
        )
        at = rng.randrange(max(1, min(end, len(data)))) if rng.random() < 0.85 else rng.randrange(max(1, len(data)))
        if kind == "bits":
            for _ in range(rng.randint(1, 8)):
                if data:
                    spot = rng.randrange(max(1, min(end, len(data))))
                    data[spot] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[at:]
        elif kind == "number":
            code = rng.choice("IQ")
            value = rng.choice(ABSURD) & ((1 << 8 * struct.calcsize("<" + code)) - 1)
            data[at : at + struct.calcsize("<" + code)] = struct.pack("<" + code, value)
        elif kind == "bytes":
            data[at : at + rng.randint(1, 16)] = rng.randbytes(rng.randint(1, 16))
        elif kind == "insert":
            data[at:at] = rng.randbytes(rng.randint(1, 64))
        elif kind == "remove":
            del data[at : at + rng.randint(1, 64)]
        elif kind == "length" and len(data) > 24:
            data[8:16] = struct.pack("<Q", rng.choice(ABSURD)) if raw[:4] == b"GGUF" else data[8:16]
            if raw[:4] != b"GGUF":
                data[:8] = struct.pack("<Q", rng.choice(ABSURD))
        elif kind == "json" and raw[:4] != b"GGUF":
            data = bytearray(with_json(bytes(data), rng))
    return bytes(data)


def with_json(raw: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header is still JSON and says something else of one tensor."""
    length = int.from_bytes(raw[:8], "little")
    try:
        fields = json.loads(raw[8 : 8 + length])
        name = rng.choice([key for key in fields if key != "__metadata__"])
        entry = fields[name]
        what = rng.choice(("dtype", "shape", "data_offsets", "name", "drop", "swap"))
        if what == "dtype":
            entry["dtype"] = rng.choice(("F32", "F16", "U8", "I8", "I32", "F8_E4M3", "F8_E8M0", "BOOL", "X", 7, None))
        elif what == "shape":
            entry["shape"] = rng.choice(
                ([], [0], [1 << 62, 4], entry["shape"][::-1], [*entry["shape"], 1], [-1], "x", [2.5], None)
            )
        elif what == "data_offsets":
            entry["data_offsets"] = rng.choice(([0, 0], [0, 1 << 62], entry["data_offsets"][::-1], [-8, 0], None, [1]))
        elif what == "name":
            fields[name[:-1] + rng.choice("xyz.")] = fields.pop(name)
        elif what == "drop":
            del fields[name]
        else:
            other = rng.choice([key for key in fields if key != "__metadata__"])
            fields[name], fields[other] = fields[other], fields[name]
        text = json.dumps(fields).encode()
    except (ValueError, IndexError, TypeError, KeyError, AttributeError):
        return raw
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def read_all(path: Path) -> None:
    """Open a model, read every tensor as values and as it is stored, and its tokenizer where it is in the file."""
    from lowbit.interchange.source import open_source

    source = open_source(path)
    for name in source.tensors:
        source.read(name)
        stored = source.stored_as(name)
        if stored is not None and stored.read is not None:
            stored.read().dequantize()
            stored.input_parts()
    source.identity()
    if path.suffix == ".gguf":
        source.tokenizer()


class Hangs(BaseException):
    """An input took longer than it may."""


def _hangs(*_: Any) -> None:
    raise Hangs


def main(root: Path, first: int, last: int) -> None:
    import transformers  # noqa: F401  (before the limits)

    from lowbit.errors import LowbitError

    models = sorted(p for p in root.iterdir() if p.is_dir())
    room = Path(tempfile.mkdtemp())
    for model in models:  # what is imported and cached by reading whole files counts for nothing
        read_all(model / "model.gguf" if (model / "model.gguf").exists() else model)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
    signal.signal(signal.SIGALRM, _hangs)
    counts: Counter[str] = Counter()
    wrong = []
    for number in range(first, last):
        rng, model = random.Random(number), models[number % len(models)]
        target = room / "input"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(model, target)
        file = target / ("model.gguf" if (target / "model.gguf").exists() else "model.safetensors")
        file.write_bytes(damaged(file.read_bytes(), rng))
        signal.alarm(SECONDS)
        try:
            read_all(file if file.suffix == ".gguf" else target)
            counts["read"] += 1
        except LowbitError as error:
            counts["refused"] += 1
            if "\n" in str(error) or len(str(error)) > 2000:
                wrong.append([number, model.name, "an error of several lines", str(error)[:400]])
        except BaseException as error:
            wrong.append(
                [number, model.name, repr(error)[:300], "".join(traceback.format_tb(error.__traceback__)[-3:])]
            )
        finally:
            signal.alarm(0)
    shutil.rmtree(room, ignore_errors=True)
    sys.stdout.write(json.dumps({"wrong": wrong, "counts": counts}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
