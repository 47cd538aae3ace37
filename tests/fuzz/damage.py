"""Damage of files: values of JSON, bytes, safetensors headers, metadata of GGUF. All random numbers come from the caller."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

ABSURD = (0, 1, 7, 0x7F, 0xFF, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
_NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 5, 7, 16, 100, 1000, 65536, 1_000_000, 2_000_000_000, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**40,
    0.0, -0.0, 0.5, 1.5, -1.0, 1e-30, 1e30, 1e300, math.nan, math.inf, -math.inf, 1e-320,
)  # fmt: skip
_TEXTS = (
    "", "x", "0", "8", "10000.0", "true", "null", "default", "linear", "llama", "gelu", "silu", "float32", "float99", "full_attention",
    "sliding_attention", "chunked_attention", "../../etc/passwd", "org/name", "a\u0000b", "\ud83d\ude00", "é" * 50, "int4:g32",
    "int8:g16", "nf4", "int4:g32:s=int4:g32:s=int4", "int4:g-1", ":", "=", "int0", "int999:g1", "x" * 5000, "{{", "{% for",
)  # fmt: skip
# Fields that config.json may hold though the damaged one does not: what a reader would look at if it were there.
FIELDS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor", "layer_types",
    "no_rope_layers", "sliding_window", "use_sliding_window", "max_position_embeddings", "tie_word_embeddings", "hidden_act",
    "hidden_activation", "dtype", "torch_dtype", "model_type", "architectures", "text_config", "vision_config",
    "quantization_config", "compression_config", "bos_token_id", "eos_token_id", "pad_token_id", "num_labels", "id2label",
    "is_encoder_decoder", "auto_map", "attn_implementation", "transformers_version", "query_pre_attn_scalar",
    "attn_logit_softcapping", "final_logit_softcapping", "attention_bias", "mlp_bias", "attention_dropout", "num_experts",
    "original_max_position_embeddings", "rope_local_base_freq", "pretraining_tp", "per_layer_config", "use_cache",
)  # fmt: skip
_ROPES: tuple[Any, ...] = (
    {"rope_type": "linear"}, {"rope_type": "linear", "factor": 0}, {"rope_type": "dynamic", "factor": -2.0},
    {"rope_type": "llama3", "factor": 8.0}, {"rope_type": "yarn", "factor": math.nan}, {"rope_type": "longrope"},
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": ["a"]}, {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0},
    {"rope_type": "nothing"}, {"type": "su"}, {"rope_theta": 0}, {"full_attention": {"rope_theta": 1e4}}, {"rope_type": None},
    {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.3},
)  # fmt: skip


def odd_value(rng: random.Random, before: Any = None, deep: int = 0) -> Any:
    """A value that may stand in place of `before`: of another type, out of range, or like it and wrong."""
    kind = rng.choice(("number", "number", "text", *("near",) * 7, "null", "flag", "list", "object", "rope", "deep"))
    if kind == "near" and type(before) is int:
        return rng.choice(
            (
                0,
                -before,
                before + 1,
                before - 1,
                2 * before,
                3 * before,
                before // 2,
                before * 1000,
                float(before),
                str(before),
            )
        )
    if kind == "near" and isinstance(before, float):
        return rng.choice(
            (
                0.0,
                -before,
                before * 1e6,
                before * 1e-6,
                before * 2,
                before / 3,
                1.0,
                math.nan,
                math.inf,
                str(before),
                [before],
            )
        )
    if kind == "near" and isinstance(before, str):
        return rng.choice(
            (before + "x", before[:-1], before.upper(), [before], {before: before}, before * 50, before[::-1])
        )
    if kind == "near" and isinstance(before, bool):
        return rng.choice((not before, int(before), str(before), None))
    if kind == "near" and isinstance(before, list):
        return rng.choice(
            (
                before[:-1],
                before + before,
                [],
                [before],
                dict.fromkeys(map(str, before), 1),
                before[::-1],
                [None] * len(before),
            )
        )
    if kind == "near" and isinstance(before, dict):
        return rng.choice(({}, [before], list(before), dict.fromkeys(before), dict.fromkeys(before, before)))
    if kind == "text":
        return rng.choice(_TEXTS)
    if kind == "null":
        return None
    if kind == "flag":
        return rng.random() < 0.5
    if kind == "rope":
        return copy.deepcopy(rng.choice(_ROPES))
    if kind == "list" and deep < 3:
        return [odd_value(rng, deep=deep + 1) for _ in range(rng.choice((0, 1, 2, 2, 3, 40)))]
    if kind == "object" and deep < 3:
        keys = (*FIELDS, "factor", "rope_type", "format", "shape", "x", "")
        return {rng.choice(keys): odd_value(rng, deep=deep + 1) for _ in range(rng.choice((0, 1, 2, 3)))}
    if kind == "deep":
        found: Any = 1
        for _ in range(rng.choice((3, 40, 200))):
            found = [found] if rng.random() < 0.5 else {"a": found}
        return found
    return rng.choice(_NUMBERS)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def damaged_json(value: Any, rng: random.Random, fields: tuple[str, ...] = FIELDS) -> Any:
    """A copy of an object with one to three values changed, taken away, moved, or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places or not isinstance(value, dict):
            return odd_value(rng)
        # Most places lie deep in long lists: half of the time a field of the whole is taken.
        top = [(c, k) for c, k in places if c is value]
        container, key = rng.choice(top if rng.random() < 0.4 else places)
        what = rng.random()
        if what < 0.65:
            container[key] = odd_value(rng, container[key])
        elif what < 0.8:
            del container[key]
        elif what < 0.9 and isinstance(container, dict):
            other, place = rng.choice(places)
            container[key] = copy.deepcopy(
                other[place] if place in other or (isinstance(other, list) and place < len(other)) else None
            )
        else:
            name = rng.choice(fields)
            value[name] = odd_value(rng, value.get(name))
    return value


def damaged_text(raw: bytes, rng: random.Random) -> bytes:
    """JSON as no program writes it: cut, with a BOM, not UTF-8, with endless numbers, nested without end, keys twice."""
    what = rng.choice(("cut", "bom", "bytes", "digits", "deep", "twice", "empty", "array"))
    at = rng.randrange(max(1, len(raw)))
    return {
        "cut": raw[:at], "bom": b"\xef\xbb\xbf" + raw, "bytes": raw[:at] + rng.randbytes(3) + raw[at + 3 :],
        "digits": raw.replace(b": ", b": " + b"9" * rng.choice((400, 5000)), 1),
        "deep": b"[" * 100_000, "twice": raw.replace(b"{", b'{"model_type": 5, "model_type": "llama", ', 1),
        "empty": b"", "array": b"[" + raw + b"]",
    }[what]  # fmt: skip


def json_bytes(value: Any) -> bytes:
    """JSON as Python writes it, NaN and lone surrogates included."""
    return json.dumps(value, indent=1).encode("utf-8", "replace")


def header_end(raw: bytes) -> int:
    """Where headers end, about: most damage is done before."""
    if raw[:4] == b"GGUF":
        return max(64, raw.rfind(b".weight") + 64)
    return 8 + int.from_bytes(raw[:8], "little")


def damaged_bytes(raw: bytes, rng: random.Random) -> bytes:
    """A copy of a file of weights with one to three kinds of damage, most of them in its header."""
    data = bytearray(raw)
    end = min(header_end(raw), len(data))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.choice(("bits", "bits", "cut", "number", "number", "bytes", "insert", "remove", "length"))
        if raw[:4] != b"GGUF" and rng.random() < 0.7:
            kind = "json"
        at = rng.randrange(max(1, min(end, len(data)))) if rng.random() < 0.85 else rng.randrange(max(1, len(data)))
        if kind == "bits" and data:
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(max(1, min(end, len(data))))] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[at:]
        elif kind == "number":
            code = rng.choice("IQ")
            size = struct.calcsize("<" + code)
            data[at : at + size] = struct.pack("<" + code, rng.choice(ABSURD) & ((1 << 8 * size) - 1))
        elif kind == "bytes":
            data[at : at + rng.randint(1, 16)] = rng.randbytes(rng.randint(1, 16))
        elif kind == "insert":
            data[at:at] = rng.randbytes(rng.randint(1, 64))
        elif kind == "remove":
            del data[at : at + rng.randint(1, 64)]
        elif kind == "length" and len(data) > 24:
            first = slice(8, 16) if raw[:4] == b"GGUF" else slice(0, 8)
            data[first] = struct.pack("<Q", rng.choice(ABSURD))
        elif kind == "json":
            data = bytearray(damaged_header(bytes(data), rng))
    return bytes(data)


def damaged_header(raw: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header is still JSON and says something else of one tensor."""
    length = int.from_bytes(raw[:8], "little")
    try:
        fields = json.loads(raw[8 : 8 + length])
        name = rng.choice([key for key in fields if key != "__metadata__"])
        entry = fields[name]
        what = rng.choice(("dtype", "shape", "shape", "data_offsets", "name", "drop", "swap", "type"))
        if what == "dtype":
            entry["dtype"] = rng.choice(("F32", "F16", "U8", "I8", "I32", "F8_E4M3", "F8_E8M0", "BOOL", "X", 7, None))
        elif what == "type":  # another type of as many bytes
            entry["dtype"] = rng.choice(
                {"F32": ("I32", "U32"), "F16": ("BF16", "I16"), "U8": ("I8", "F8_E4M3", "BOOL"), "BF16": ("F16",)}.get(
                    entry["dtype"], ("F32",)
                )
            )
        elif what == "shape":
            whole = math.prod(entry["shape"])
            entry["shape"] = rng.choice((
                [], [0], [1 << 62, 4], entry["shape"][::-1], [*entry["shape"], 1], [-1], "x", [2.5], None, [whole], [1, whole], [whole, 1],
            ))  # fmt: skip
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


# ---------------------------------------------------------------- GGUF, metadata by metadata

_CODES = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
Pair = tuple[bytes, int, Any]  # key, type, value: bytes for a string, (type, values) for an array


def gguf_pairs(raw: bytes) -> tuple[list[Pair], bytes, int]:
    """The metadata of a whole file, what follows them up to the data, and where in the file that began."""
    at = 24

    def number(code: str) -> Any:
        nonlocal at
        (found,) = struct.unpack_from(code, raw, at)
        at += struct.calcsize(code)
        return found

    def value(kind: int) -> Any:
        nonlocal at
        if kind == 8:
            size = number("<Q")
            at += size
            return raw[at - size : at]
        if kind == 9:
            inner, count = number("<I"), number("<Q")
            return inner, [value(inner) for _ in range(count)]
        return number(_CODES[kind])

    pairs = []
    for _ in range(struct.unpack_from("<Q", raw, 16)[0]):
        key = value(8)
        kind = number("<I")
        pairs.append((key, kind, value(kind)))
    return pairs, raw[at:], at


def _gguf_value(kind: int, value: Any) -> bytes:
    if kind == 8:
        return struct.pack("<Q", len(value)) + value
    if kind == 9:
        inner, values = value
        return struct.pack("<IQ", inner, len(values)) + b"".join(_gguf_value(inner, v) for v in values)
    return struct.pack(_CODES[kind], value)


def gguf_bytes(raw: bytes, pairs: list[Pair], alignment: int = 32) -> bytes:
    """The file `raw` with other metadata: the data are moved to where their alignment wants them."""
    _, rest, before = gguf_pairs(raw)
    tensors = struct.unpack_from("<Q", raw, 8)[0]
    at = 0
    for _ in range(tensors):  # name, dimensions, type, offset
        (size,) = struct.unpack_from("<Q", rest, at)
        (count,) = struct.unpack_from("<I", rest, at + 8 + size)
        at += 8 + size + 4 + 8 * count + 4 + 8
    table, data = rest[:at], rest[at + -(before + at) % alignment :]
    head = (
        raw[:16]
        + struct.pack("<Q", len(pairs))
        + b"".join(_gguf_value(8, k) + struct.pack("<I", t) + _gguf_value(t, v) for k, t, v in pairs)
        + table
    )
    return head + b"\0" * (-len(head) % alignment) + data


def _changed(pair: Pair, rng: random.Random) -> Pair | None:
    """Another metadata in place of `pair`, or None for none."""
    key, kind, value = pair
    changes: tuple[Callable[[], Pair | None], ...] = (
        lambda: (key, 4, rng.choice((0, 1, 2, 3, 7, 1 << 20, (1 << 32) - 1))),
        lambda: (key, 5, rng.choice((0, -1, 5, -(1 << 31)))),
        lambda: (key, 6, rng.choice((0.0, -1.0, math.nan, math.inf, 1e30, 0.5))),
        lambda: (key, 10, rng.choice(ABSURD)),
        lambda: (key, 7, rng.random() < 0.5),
        lambda: (key, 8, rng.choice((b"", b"llama", b"\xff\xfe", b"x" * 3000, b"yarn", b"gpt2", b"{{ x", b"qwen2"))),
        lambda: (key, 9, (4, [rng.choice((0, 1, 4, 1 << 31)) for _ in range(rng.choice((0, 1, 2, 300)))])),
        lambda: (key, 9, (8, [rng.randbytes(3) for _ in range(rng.choice((0, 1, 5)))])),
        lambda: (key, kind, (value[0], value[1][: rng.randrange(len(value[1]) + 1)]) if kind == 9 else value),
        lambda: None,
        lambda: (b"llama.rope.scaling.type", 8, rng.choice((b"yarn", b"linear", b"longrope", b"none", b"x"))),
        lambda: (b"llama.rope.scaling.factor", 6, rng.choice((0.0, 4.0, -1.0, math.nan))),
        lambda: (b"llama.vocab_size", 4, rng.choice((0, 1, 96, 1 << 31))),
        lambda: (b"llama.expert_count", 4, rng.choice((0, 2, 1 << 31))),
        lambda: (b"general.architecture", 8, rng.choice((b"llama", b"qwen2", b"gemma2", b"phi3", b"bert", b"mamba", b"gpt2", b"x"))),
    )  # fmt: skip
    return rng.choice(changes)()


def damaged_gguf(raw: bytes, rng: random.Random) -> bytes:
    """A file that is whole but for one to three of its metadata."""
    pairs, _, _ = gguf_pairs(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(pairs))
        made = _changed(pairs[at], rng)
        del pairs[at]
        if made is not None:
            pairs = [p for p in pairs if p[0] != made[0]]
            pairs.insert(min(at, len(pairs)), made)
        if not pairs:
            break
    return gguf_bytes(raw, pairs)
