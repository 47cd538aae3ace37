"""Calls everything that `lowbit._core` has over a grid of small shapes, and holds it against numpy in float64.

    python drive_core.py MODULE PART

A program of its own, because the sanitizers must be there before Python is, and PyTorch need not be. What is drawn belongs
to a case by its name: it is the same whatever instructions a processor has, and in whichever order cases are run.
"""

from __future__ import annotations

import itertools
import sys
import zlib
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import numpy as np

SHAPES = ((1, 32), (16, 48), (17, 80), (33, 200), (48, 576))
ROWS = (1, 2, 5, 13, 97)
VOCABULARY = {False: 128, True: 203}
rng = np.random.default_rng(0)


def begin(*case: object) -> None:
    """What is drawn from here on belongs to this case."""
    global rng
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()))


def load(path: str) -> Any:
    """By its path, so that the module of the package stays out of it."""
    spec = spec_from_file_location("_core", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def close(found: Any, right: Any, bound: float, *what: object) -> None:
    error = np.linalg.norm(found - right) / max(np.linalg.norm(right), 1e-30)
    assert error <= bound, (error, *what)


def steps(x: Any, segment: int, bits: int, per_token: bool = False, static_scale: float = 0.0) -> Any:
    """The step by which each of x [rows, cols] is rounded, as kernels/quantize.inl says."""
    if static_scale:
        return np.full_like(x, static_scale)
    ends = [(0, x.shape[1])] if per_token else [(k, k + segment) for k in range(0, x.shape[1], segment)]
    peaks = [np.abs(x[:, a:b]).max(1, keepdims=True) for a, b in ends]
    widths = [min(b, x.shape[1]) - a for a, b in ends]
    reach = {8: 127, 15: 16256}[bits]
    return np.concatenate([np.repeat(p, w, 1) for p, w in zip(peaks, widths, strict=True)], 1) / reach


def rounded(found: Any, x: Any, step: Any, values: Any, bias: Any, *what: object) -> None:
    """found = x values' + bias, x rounded in steps: an error is a sum of uniform ones of variance step^2 / 12, each times a
    weight, so that six deviations are as good as a bound however much of the sum itself cancels. And float32 sums."""
    x, step, values = (np.asarray(v, np.float64) for v in (x, step, values))
    deviation = np.sqrt((step**2 / 12) @ (values**2).T)
    error = np.abs(found - (x @ values.T + bias))
    bound = 6 * deviation + 1e-6 * (np.abs(x) @ np.abs(values).T + np.abs(bias))
    assert (error <= bound).all(), ((error / bound).max(), *what)


def refused(call: Any, *arguments: Any, **options: Any) -> None:
    try:
        call(*arguments, **options)
    except (ValueError, TypeError):
        return
    raise AssertionError(f"{arguments} {options} were taken")


def packed(core: Any, kind: str, rows: int, cols: int, group: int, minimum: bool, wide: bool, **options: Any) -> Any:
    """(Weight, its values float64 [rows, cols])"""
    groups = 1 if group == 0 else -(-cols // group)
    bits = 8 if kind == "u8" else 4
    codes = rng.integers(0, 1 << bits, (rows, cols), dtype=np.uint8)
    scale = rng.uniform(0.5, 2.0, (rows, groups)).astype(np.float32)
    low = rng.normal(size=(rows, groups)).astype(np.float32)
    if not wide:
        scale, low = scale.astype(np.float16).astype(np.float32), low.astype(np.float16).astype(np.float32)
    table = rng.integers(0, 256, 16, dtype=np.uint8) if kind == "table4" else None
    zero = {"u8": 128, "u4": 8, "table4": 128}[kind]
    weight = core.pack(bits, group, zero, [(codes, scale, low if minimum else None)], table, **options)
    levels = (codes if table is None else table[codes]).astype(np.float64) - zero
    spread = np.arange(cols) // (group or cols)
    return weight, levels * scale[:, spread] + (low[:, spread] if minimum else 0)


def kernels(core: Any) -> None:
    pool = core.ThreadPool(2)
    every = itertools.product(("u4", "table4", "u8"), (0, 16, 32, 96), (False, True), (False, True))
    for n, (kind, group, minimum, wide) in enumerate(every):
        shape = SHAPES[n % len(SHAPES)]
        begin("weight", kind, group, minimum, wide)
        weight, values = packed(core, kind, *shape, group, minimum, wide)
        row = np.empty(shape[1], np.float32)
        for r in range(shape[0]):
            weight.unpack_row(r, row)
            close(row, values[r], 1e-5, kind, group)
        refused(weight.unpack_row, shape[0], row)
        refused(weight.unpack_row, 0, np.empty(shape[1] + 1, np.float32))
        for isa, bits in itertools.product(core.isas(), (8, 15)):
            multiplier, rows = core.Multiplier(pool, isa), ROWS[(n + 1 + bits // 15) % len(ROWS)]
            begin("inputs", kind, group, minimum, wide, bits)
            x, bias = (rng.normal(size=s).astype(np.float32) for s in ((rows, shape[1]), (shape[0],)))
            divisor = rng.uniform(0.5, 2, shape[1]).astype(np.float32)
            y = np.empty((rows, shape[0]), np.float32)
            for options, inputs in (
                ({}, x),
                ({"per_token": True}, x),
                ({"static_scale": 0.05}, x),
                ({"divisor": divisor}, x / divisor),
            ):
                if "static_scale" in options and bits == 15:
                    continue
                factor = core.Factor(weight, core.ActivationSpec(bits=bits, **options))
                multiplier.linear(factor, x, y, bias)
                given = {k: v for k, v in options.items() if k != "divisor"}
                step = steps(inputs, weight.segment, bits, **given)
                rounded(y, inputs, step, values, bias, kind, group, isa, bits, options)
            multiplier.linear(core.Factor(weight, core.ActivationSpec(bits=bits)), x[:0], y[:0])
            refused(multiplier.linear, core.Factor(weight), x[:, 1:].copy(), y)
            refused(multiplier.linear, core.Factor(weight), x, y, bias[1:].copy())
    floats(core, pool)
    sums(core, pool)


def floats(core: Any, pool: Any) -> None:
    for kind, shape in itertools.product(("f32", "f16", "bf16"), SHAPES):
        begin("floats", kind, shape)
        values = rng.normal(size=shape).astype(np.float32)
        if kind == "f16":
            given, values = values.astype(np.float16).view(np.int16), values.astype(np.float16).astype(np.float32)
        elif kind == "bf16":
            given = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
            values = (given.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            given = values
        weight = core.pack_floats(kind, [given])
        for isa, rows in itertools.product(core.isas(), (1, 7)):
            begin("inputs", kind, shape, rows)
            x, y = rng.normal(size=(rows, shape[1])).astype(np.float32), np.empty((rows, shape[0]), np.float32)
            core.Multiplier(pool, isa).linear(core.Factor(weight), x, y)
            rounded(y, x, np.zeros_like(x), values, 0.0, kind, isa)
        refused(core.pack_floats, kind, [given.astype(np.float64)])


def sums(core: Any, pool: Any) -> None:
    """A second weight that is added, and rows of halves at addresses."""
    begin("sums")
    one, first = packed(core, "table4", 33, 192, 32, False, False)
    two, second = packed(core, "u4", 33, 192, 32, False, False)
    x = rng.normal(size=(9, 192)).astype(np.float32)
    for isa in core.isas():
        multiplier, y = core.Multiplier(pool, isa), np.empty((9, 33), np.float32)
        factor = core.Factor(one, residual=two)
        multiplier.linear(factor, x, y)
        close(y, x @ (first + second).T, 3e-4, isa)
        halves, out = x.astype(np.float16), np.empty((9, 33), np.float16)
        multiplier.linear_at(factor, halves.ctypes.data, 9, out.ctypes.data, core.Value.f16)
        close(out.astype(np.float64), halves.astype(np.float64) @ (first + second).T, 2e-3, isa)
        brain = (x.view(np.uint32) >> 16).astype(np.uint16)
        multiplier.linear_at(factor, brain.ctypes.data, 9, out.ctypes.data, core.Value.bf16, 0)
    refused(core.Factor, one, residual=packed(core, "u4", 17, 80, 0, False, False)[0])
    refused(core.ActivationSpec, bits=3)
    refused(core.ActivationSpec, bit=8)


def spread(core: Any) -> None:
    """Channels far above their neighbours, as large as 1e6, change nothing of what these give."""
    pool = core.ThreadPool(2)
    for (bits, zero, table), group, big in itertools.product(
        ((8, 128, None), (4, 8, None), (4, 128, np.arange(120, 136, dtype=np.uint8))), (0, 32), (1e3, 1e4, 1e6)
    ):
        begin("spread", bits, zero, group)
        codes = rng.integers(0, 1 << bits, (48, 192), dtype=np.uint8)
        codes[:, [3, 77, 130]] = 8 if table is not None else zero  # levels of nothing
        scale = rng.uniform(0.5, 2.0, (48, 192 // group if group else 1)).astype(np.float32)
        weight = core.pack(bits, group, zero, [(codes, scale, None)], table)
        levels = (codes if table is None else table[codes]).astype(np.float64) - zero
        values = levels * scale[:, np.arange(192) // (group or 192)]
        x = rng.normal(size=(7, 192)).astype(np.float32)
        x[1::2, [3, 77, 130]] *= big
        for isa in core.isas():
            y = np.empty((7, 48), np.float32)
            core.Multiplier(pool, isa).linear(core.Factor(weight), x, y)
            for r, found in enumerate(y):
                close(found, x[r] @ values.T, 2e-3, bits, group, big, isa, r)
            for bad in (np.inf, -np.inf, np.nan):
                other = x.copy()
                other[2, 100] = bad
                core.Multiplier(pool, isa).linear(core.Factor(weight), other, y)
                assert np.isnan(y[2]).all() and np.isfinite(np.delete(y, 2, 0)).all(), (bits, group, isa, bad)
    for where, isa in itertools.product(("keys", "queries", "values"), core.isas()):
        begin("spread", where)
        spread_cache(core, where, isa)


def spread_cache(core: Any, where: str, isa: str) -> None:
    """Large in keys and small in queries, or the other way round, or large in values: the function is the same."""
    found = {}
    for big in (1.0, 2.0**13, 2.0**20):
        built, ropes = model(core, "f32", 4, 2, 32, False, (where, big))
        for int8, chunk in itertools.product((False, True), (1, 7, 90)):
            one = core.Decoder(core.ModelSpec(**built), ropes, core.ThreadPool(1), isa)
            cache, logits = (
                core.KVCache(one, 2, 90, kept(core, "int8" if int8 else "int16")),
                np.zeros((2, built["vocabulary"]), np.float32),
            )
            for first in range(0, 90, chunk):
                run(one, cache, [range(first, min(first + chunk, 90)), range(first, min(first + chunk, 70))], logits)
            right = found.setdefault((int8, big), logits)
            assert (logits == right).all(), (where, isa, big, int8, chunk)
        close(found[False, big], found[False, 1.0], 1e-2, where, isa, big)
        if big < 2**20:
            close(found[True, big], found[False, 1.0], 0.1, where, isa, big, "int8")


def joined(core: Any) -> None:
    """Weights one after another, pairs, and what cannot be packed."""
    for kind in ("u4", "u8"):
        begin("joined", kind)
        bits = 4 if kind == "u4" else 8
        codes = [rng.integers(0, 16, (rows, 64), dtype=np.uint8) for rows in (32, 16, 5)]
        scales = [np.ones((len(c), 2), np.float32) for c in codes]
        weight = core.pack(bits, 32, 0, [(c, s, None) for c, s in zip(codes, scales, strict=True)])
        row = np.empty(64, np.float32)
        for r, right in enumerate(np.concatenate(codes)):
            weight.unpack_row(r, row)
            assert np.array_equal(row, right)
        core.pack(bits, 32, 0, [(codes[0], scales[0], None)] * 2, paired=True)
        refused(core.pack, bits, 32, 0, [(codes[2], scales[2], None)] * 2, paired=True)
        refused(core.pack, bits, 32, 0, [(codes[2], scales[2], None), (codes[0], scales[0], None)])
        refused(core.pack, bits, 32, 0, [])
        refused(core.pack, 3, 32, 0, [(codes[0], scales[0], None)])
        for group, zero in ((24, 0), (-1, 0), (32, 3), (32, -8)):
            refused(core.pack, bits, group, zero, [(codes[0], scales[0], None)])
        refused(core.pack, bits, 32, 0, [(codes[0], scales[1], None)])
    for bits, code, rows in ((4, 16, 16), (8, 1, 0)):
        refused(core.pack, bits, 0, 0, [(np.full((rows, 32), code, np.uint8), np.ones((rows, 1), np.float32), None)])


def projection(core: Any, kind: str, cols: int, widths: list[int], paired: bool = False, factors: Any = None) -> Any:
    """Weights that read one input: a pair, or parts one after another. factors: of the float weights, for each part."""

    def weight(sources: list[Any]) -> Any:
        if kind.startswith("f"):
            return core.pack_floats("f32", sources, paired)
        given = [
            (np.clip(np.round(s * 3 + 8), 0, 15).astype(np.uint8), np.full((len(s), -(-cols // 16)), 0.25 / cols**0.5, np.float32), None)
            for s in sources
        ]  # fmt: skip
        table = np.arange(16, dtype=np.uint8) if kind == "table4" else None
        return core.pack(4, 16, 8, given, table, paired)

    sources = [rng.normal(size=(n, cols)).astype(np.float32) * (cols**-0.5 if kind[0] == "f" else 1) for n in widths]
    factors = [np.ones((1, 1))] * len(widths) if factors is None else factors  # [rows, 1] or [1, columns]
    if kind.startswith("f"):
        sources = [(s * f).astype(np.float32) for s, f in zip(sources, factors, strict=True)]
    exact = core.ActivationSpec()
    if paired:
        part = core.PartSpec(weight=weight(sources), activations=exact)
        return core.ProjectionSpec(cols=cols, width=widths[0], parts=[part])
    offsets = np.cumsum([0, *widths])
    parts = [
        core.PartSpec(
            weight=weight([s]),
            residual=weight([s * 0.1]) if kind == "table4" else None,
            activations=exact,
            bias=(rng.normal(size=len(s)) * (f[:, 0] if f.shape[1] == 1 else 1)).astype(np.float32),
            offset=int(o),
        )
        for s, o, f in zip(sources, offsets, factors, strict=False)
    ]
    return core.ProjectionSpec(cols=cols, width=sum(widths), parts=parts)


def scaled(where: str, big: float, heads: int, key_heads: int, head_dim: int) -> tuple[Any, Any]:
    """Factors of the rows of q, k and v, and of the columns of what reads them, that leave the function as it is."""
    q, k, v, o = (np.ones((n * head_dim, 1)) for n in (heads, key_heads, key_heads, heads))
    pair = [3, 3 + head_dim // 2]  # turned together
    if where == "values":
        v.reshape(-1, head_dim)[:, 5], o.reshape(-1, head_dim)[:, 5] = big, 1 / big
    else:
        large, small = (k, q) if where == "keys" else (q, k)
        large.reshape(-1, head_dim)[:, pair], small.reshape(-1, head_dim)[:, pair] = big, 1 / big
    return [q, k, v], [o.T]


def model(
    core: Any, kind: str, heads: int, key_heads: int, head_dim: int, odd: bool, large: tuple[str, float] = ("keys", 1.0)
) -> tuple[dict[str, Any], list[Any]]:
    """What a `ModelSpec` of two layers takes, with everything that a family may have or as little as possible; its ropes.

    large: see `scaled`.
    """
    begin("model", kind, heads, key_heads, head_dim, odd)
    width, hidden = (80, 104) if odd else (64, 96)
    vocabulary = VOCABULARY[odd]
    inside, after = scaled(*large, heads, key_heads, head_dim) if large[1] != 1 else (None, None)

    def norm(n: int) -> Any:
        return rng.uniform(0.5, 1.5, n).astype(np.float32)

    def mlp() -> Any:
        return core.MlpSpec(
            gate_up=projection(core, kind, width, [hidden] * 2, paired=not odd),
            down=projection(core, kind, hidden, [width]),
        )

    def experts() -> Any:
        return core.ExpertsSpec(
            router=projection(core, "f32", width, [5]),
            experts=[mlp() for _ in range(5)],
            top_k=2,
            normalized=heads == 3,
        )

    def layer(i: int) -> Any:
        across = odd and i  # norms of all heads together
        return core.LayerSpec(
            attention_norm=norm(width), mlp_norm=norm(width),
            attention_post_norm=norm(width) if odd else None, mlp_post_norm=norm(width) if odd else None,
            query_norm=norm(head_dim * (heads if across else 1)) if odd else None,
            key_norm=norm(head_dim * (key_heads if across else 1)) if odd else None,
            qkv=projection(core, kind, width, [heads * head_dim, key_heads * head_dim, key_heads * head_dim], factors=inside),
            output=projection(core, kind, heads * head_dim, [width], factors=after),
            **({"experts": experts()} if odd and i else {"mlp": mlp()}),
            rope=-1 if odd and i else 0, window=20 if odd and i else 0,
        )  # fmt: skip

    frequency = (100.0 ** -np.linspace(0, 1, head_dim // 4 if odd else head_dim // 2)).astype(np.float32)
    table = core.pack_floats("f32", [rng.normal(size=(vocabulary, width)).astype(np.float32)])
    head = core.PartSpec(weight=table, activations=core.ActivationSpec())
    return {
        "width": width, "heads": heads, "key_heads": key_heads, "head_dim": head_dim, "vocabulary": vocabulary,
        "epsilon": 1e-5, "attention_scale": head_dim**-0.5, "attention_soft_cap": 30.0 if odd else 0.0,
        "logit_soft_cap": 20.0 if odd else 0.0, "logit_scale": 1.0, "embedding_scale": 2.0 if odd else 1.0,
        "residual_scale": 0.5 if odd else 1.0, "gate": core.Gate.gelu_tanh if odd else core.Gate.silu, "embedding": table,
        "final_norm": norm(width), "head": core.ProjectionSpec(cols=width, width=vocabulary, parts=[head]),
        "layers": [layer(i) for i in range(2)],
    }, [core.RopeSpec(inverse_frequency=frequency, interleaved=odd)]  # fmt: skip


def decoder(core: Any) -> None:
    for kind, heads, key_heads, head_dim, odd in (
        ("u4", 4, 2, 16, False), ("table4", 6, 1, 32, True), ("f32", 3, 3, 48, True), ("u4", 8, 8, 16, True),
    ):  # fmt: skip
        built, ropes = model(core, kind, heads, key_heads, head_dim, odd)
        lengths, found = (70, 1, 530 if heads == 4 else 129, 17), {}
        for isa, threads, stored in itertools.product(core.isas(), (1, 3), STORED):
            if threads == 1 and stored not in ("int16", "int8"):
                continue
            one = core.Decoder(core.ModelSpec(**built), ropes, core.ThreadPool(threads), isa)
            if head_dim == 48 and stored == "rotated":
                refused(core.KVCache, one, 1, 64, kept(core, stored))
                continue
            cache = core.KVCache(one, len(lengths), max(lengths) + 1, kept(core, stored))
            assert cache.bytes_per_position > 0 and cache.exact_bytes >= 0
            logits = np.zeros((len(lengths), built["vocabulary"]), np.float32)
            for first, last in ((0, 0.6), (0.6, 1.0)):
                parts = [range(int(n * first), max(int(n * last), 1) if first == 0 else n) for n in lengths]
                run(one, cache, parts, logits)
            run(one, cache, [range(n, n + 1) for n in lengths], logits)
            assert np.isfinite(logits).all()
            # Between sets of instructions last bits of floats differ, and with them a code here and there.
            close(
                logits,
                found.setdefault(stored, logits),
                1e-3 if stored in ("int16", "int8") else 0.05,
                kind,
                isa,
                threads,
                stored,
            )
            for wrong in ([-1], [built["vocabulary"]]):
                refused(one.forward, cache, *(np.array(v, np.int32) for v in (wrong, [0], [0], [0])), logits[:1].copy())
            for sequence, position, wanted in ((9, 0, 0), (0, 99999, 0), (0, -1, 0), (0, 0, 1)):
                given = (np.array([v], np.int32) for v in (5, sequence, position, wanted))
                refused(one.forward, cache, *given, logits[:1].copy())
        for stored, bound in STORED.items():
            if stored in found:
                close(found[stored], found["int16"], bound, kind, stored)
        refused(core.KVCache, one, 1, 64, kept(core, "int8")[:1])
        for change in ({"heads": heads + 1}, {"head_dim": head_dim + 8}, {"final_norm": np.ones(9, np.float32)}):
            refused(core.Decoder, core.ModelSpec(**built | change), ropes, core.ThreadPool(1))
        refused(core.Decoder, core.ModelSpec(**built), [], core.ThreadPool(1))
        refused(core.ModelSpec, **built, head_dims=head_dim)
        del built["head"]
        refused(core.ModelSpec, **built)
        refused(core.KVCache, one, 0, 5)


# Ways in which keys and values are stored, and how far logits may be from those with 16 bits.
STORED = {"int16": 0.0, "int8": 0.1, "groups": 0.4, "rotated": 0.6, "windows": 0.6, "channels": 0.9}


def kept(core: Any, stored: str) -> list[Any]:
    """Both layers, stored so."""
    plain = core.KVSide()
    whole = core.KVSide(bits=8, low=-128, count=256, reach=127)
    table = core.KVSide(
        bits=4, count=5, levels=[-80, -30, 1, 30, 80], bounds=[-27, -7, 7, 27], unit=0.5, fit="norm", reach=20
    )
    channels = core.KVSide(bits=3, count=8, group=1, tokens=32, offset="min", fit="minmax")
    others = core.KVSide(bits=7, low=-64, count=128, group=1, tokens=64, offset="zero", fit="minmax")
    if stored == "groups":
        bits = [core.KVSide(bits=b, low=-(1 << b - 1), count=1 << b, reach=(1 << b - 1) - 1, group=16) for b in (4, 6)]
        return [core.KVLayer(keys=bits[0], values=bits[1]), core.KVLayer(keys=plain, values=bits[0])]
    if stored == "rotated":
        five = core.KVSide(bits=5, count=32, offset="min", fit="minmax", group=16, rotate=True)
        return [core.KVLayer(keys=five, values=five), core.KVLayer(keys=five, values=plain)]
    if stored == "windows":
        return [
            core.KVLayer(keys=table, values=whole, sinks=3, recent=40),
            core.KVLayer(keys=whole, values=table, sinks=70),
        ]
    if stored == "channels":
        return [
            core.KVLayer(keys=channels, values=others, recent=64, sinks=1),
            core.KVLayer(keys=others, values=channels),
        ]
    side = whole if stored == "int8" else plain
    return [core.KVLayer(keys=side, values=side)] * 2


def stores(core: Any) -> None:
    """What is no way to store anything is refused."""
    begin("stores")
    built, ropes = model(core, "f32", 4, 2, 32, False)
    one = core.Decoder(core.ModelSpec(**built), ropes, core.ThreadPool(1))
    good = {"bits": 4, "low": -8, "count": 16, "reach": 7.0}
    for change in (
        {"bits": 9}, {"bits": 0}, {"bits": 12}, {"count": 17}, {"count": 1}, {"group": 24}, {"group": 8}, {"group": 64}, {"tokens": 16},
        {"tokens": 32}, {"tokens": 32, "group": 16}, {"offset": "min"}, {"fit": "minmax"}, {"reach": 0.0}, {"unit": 2.0}, {"bits": 8, "low": 0, "count": 300},
        {"bits": 5, "low": 100, "count": 32},
    ):  # fmt: skip
        side = core.KVSide(**good | change)
        layer = core.KVLayer(keys=side, values=core.KVSide())
        refused(core.KVCache, one, 1, 64, [layer] * 2)
    for change in (
        {"fit": "search"},
        {"offset": "max"},
        {"levels": [1, 2]},
        {"low": 127},
        {"levels": list(range(0, 320, 20)), "bounds": [0.0] * 15},
    ):
        refused(core.KVSide, **good | change)
    whole = core.KVSide(**good)
    for change in ({"sinks": -1}, {"recent": 1 << 21}):
        refused(core.KVCache, one, 1, 64, [core.KVLayer(keys=whole, values=whole, **change)] * 2)
    cache, logits = core.KVCache(one, 1, 2000, kept(core, "windows")), np.zeros((1, built["vocabulary"]), np.float32)
    run(one, cache, [range(1000)], logits)
    assert (
        cache.can_go_on(0, 1000)
        and cache.can_go_on(0, 0)
        and not cache.can_go_on(0, 300)
        and not cache.can_go_on(0, 2048)
    )
    refused(cache.can_go_on, 1, 0)
    ids = np.arange(300, 310, dtype=np.int32) % 100
    position = np.arange(300, 310, dtype=np.int32)
    refused(one.forward, cache, ids, np.zeros_like(ids), position, np.array([9], np.int32), logits)
    ids = np.zeros(cache.piece + 1, np.int32)
    refused(one.forward, cache, ids, ids, np.arange(1000, 1000 + len(ids), dtype=np.int32), ids[:1], logits)


def run(one: Any, cache: Any, parts: list[range], logits: Any) -> None:
    """A forward of these positions of each sequence; those that are empty are left out."""
    most = cache.piece or max(map(len, parts))
    if max(map(len, parts)) > most:
        run(one, cache, [p[:most] for p in parts], logits)
        run(one, cache, [p[most:] for p in parts], logits)
        return
    position = np.concatenate([np.array(p, np.int32) for p in parts])
    sequence = np.concatenate([np.full(len(p), i, np.int32) for i, p in enumerate(parts)])
    ids = (position * 37 + sequence) % 100
    there = [i for i, p in enumerate(parts) if len(p)]
    wanted = np.array([np.flatnonzero(sequence == i)[-1] for i in there], np.int32)
    rows = np.empty((len(there), logits.shape[1]), np.float32)
    one.forward(cache, ids.astype(np.int32), sequence, position, wanted, rows)
    logits[there] = rows


def interrupted(core: Any) -> None:
    """A handler that raises ends a forward wherever it is; what is left behind is good for the next one."""
    import signal

    if not hasattr(signal, "setitimer"):
        return

    def handler(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, handler)
    for kind, odd, threads, every in itertools.product(("u4", "f32"), (False, True), (1, 3), (0.06, 0.09)):
        built, ropes = model(core, kind, 4, 2, 16, odd)
        one = core.Decoder(core.ModelSpec(**built), ropes, core.ThreadPool(threads))
        cache = core.KVCache(one, 8, 2500)
        logits = np.zeros((8, VOCABULARY[odd]), np.float32)
        run(one, cache, [range(100)] * 8, logits)
        right, found = logits.copy(), 0
        signal.setitimer(signal.ITIMER_REAL, every)
        try:
            while True:
                run(one, cache, [range(100, 2400)] * 8, logits)
        except KeyboardInterrupt:
            found += 1
        run(one, cache, [range(100)] * 8, logits)
        assert found == 1 and (logits == right).all()


def sampler(core: Any) -> None:
    begin("sampler")
    random = core.Random(2**64 - 1)
    for size, t, k, p, m, r in itertools.product(
        (1, 2, 65, 3000), (0.0, 1e-30, 1.0, 50.0), (0, 1, 64, 9999), (0.01, 1.0), (0.0, 1.0), (1.0, 1.7)
    ):
        logits = rng.normal(size=size).astype(np.float32)
        seen = (rng.random(size) < 0.5).astype(np.uint8)
        assert 0 <= core.sample(logits, random, seen, t, k, p, m, r) < size
    for extreme in (np.inf, -np.inf, np.nan):
        for t in (0.0, 1.0, 1e300):
            assert 0 <= core.sample(np.full(70, extreme, np.float32), random, None, t, 0, 0.9, 0.1, 1.0) < 70
    for k in (0, 500):  # order means nothing with these, which sorting must survive
        holes = np.where(rng.random(3000) < 0.3, np.nan, rng.normal(size=3000)).astype(np.float32)
        assert not np.isnan(holes.copy()[core.sample(holes.copy(), random, None, 1.0, k, 0.9, 0.0, 1.0)])
        assert not np.isnan(holes.copy()[core.sample(holes.copy(), random, None, 0.0, k, 0.9, 0.0, 1.0)])
    refused(core.sample, np.zeros(300, np.float32), random, np.zeros(299, np.uint8))


def limits(core: Any) -> None:
    assert core.features()["cores"] >= 1
    for isa in core.isas():
        core.limits(core.ThreadPool(2), isa, 1 << 20, 1)


def solvers(core: Any) -> None:
    """Codes and scales of small weights, the errors that are told of them, and what is refused."""
    kinds = itertools.product(
        ("integers", "table"), ("none", "points", "minima"), ((1, 16, 16), (33, 50, 16), (20, 71, 71))
    )
    for levels, offsets, (rows, cols, group) in kinds:
        begin("solvers", levels, offsets, rows, cols)
        table = np.sort(rng.normal(size=11)).astype(np.float32) * 4
        bounds = ((table[1:] + table[:-1]) / 2).astype(np.float32)
        order_of_codes = rng.permutation(11).astype(np.uint8)
        grid = (
            core.GridLevels((-8, 7)) if levels == "integers" else core.GridLevels(table=(table, bounds, order_of_codes))
        )
        x, groups = rng.normal(size=(2 * cols, cols)), -(-cols // group)
        hessian = (x.T @ x / len(x) + 0.1 * np.eye(cols)).astype(np.float32)
        order = rng.permutation(cols).astype(np.int32)
        backwards = hessian[order[::-1]][:, order[::-1]].astype(np.float64)
        root = np.ascontiguousarray(np.linalg.cholesky(backwards)[::-1, ::-1]).astype(np.float32)
        weight = rng.normal(size=(rows, cols)).astype(np.float32)
        start_scale = rng.uniform(0.2, 0.4, (rows, groups)).astype(np.float32)
        start_offset = None if offsets == "none" else rng.integers(-2, 3, (rows, groups)).astype(np.float32)
        still = (rng.random((rows, cols)) < 0.1).astype(np.uint8)
        shift = np.triu(rng.normal(size=(cols, cols)) * 1e-3, 1).astype(np.float32)
        right = None
        for isa, threads, kept in itertools.product(core.isas(), (1, 3), (1 << 20, 0)):
            for p, mask, rounds in ((None, None, 0), (None, None, 3), (shift, None, 0), (None, still, 2)):
                scale, offset = start_scale.copy(), None if start_offset is None else start_offset.copy()
                codes, error, start = np.zeros((rows, cols), np.uint8), np.zeros(rows), np.zeros(rows)
                refit = mask is None or offsets != "minima"
                core.solve(
                    core.ThreadPool(threads), isa, grid, getattr(core.Offsets, offsets), group, weight, scale, offset, hessian, order,
                    mask, codes, error, feed=(root, p, start), rounds=rounds, refit=refit, scale_store="fp16", offset_store="fp16",
                    most_kept=kept,
                )  # fmt: skip
                level = codes - 8.0 if levels == "integers" else table[np.argsort(order_of_codes)][codes]
                spread = [np.repeat(v, group, 1)[:, :cols] for v in (scale, scale * 0 if offset is None else offset)]
                values = level * spread[0] + spread[1] if offsets == "minima" else (level - spread[1]) * spread[0]
                off = values - weight
                close(error, ((off @ hessian) * off).sum(1), 1e-3, levels, offsets, isa)
                assert p is not None or mask is not None or (error <= start).all()
            right = error if right is None else right
            close(error, right, 1e-2, levels, offsets, isa, threads)
        again = codes.copy()
        given = (
            core.ThreadPool(1),
            "",
            grid,
            getattr(core.Offsets, offsets),
            group,
            weight,
            scale,
            offset,
            hessian,
            order,
            None,
        )
        core.solve(*given, again, error)
        core.solve(*given, again, error, rounds=2)
        refused(core.solve, *given[:4], 0, *given[5:], again, error)
        refused(core.solve, *given[:5], weight[:, 1:].copy(), *given[6:], again, error)
        refused(core.solve, *given, again[:, 1:].copy(), error)
        refused(core.solve, *given, again, error, feed=(root[1:].copy(), None, start))
    refused(core.GridLevels)
    refused(core.GridLevels, (0, 300))
    refused(core.GridLevels, table=(np.zeros(17, np.float32), np.zeros(16, np.float32), np.zeros(17, np.uint8)))


def bf16(x: Any) -> Any:
    """The upper halves of float32 numbers as uint16, rounded to nearest."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def wide(x: Any) -> Any:
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def moments(core: Any) -> None:
    """Sums of products in bfloat16, and that arrays which do not belong together are refused."""
    if not core.multiplies_bfloat16():
        return
    pools = [core.ThreadPool(n) for n in (1, 3)]
    for tokens, width in itertools.product((1, 2, 33, 1100), (1, 16, 47, 48, 50, 200)):
        begin("moments", tokens, width)
        x, y = (rng.standard_normal((tokens, width)).astype(np.float32) for _ in range(2))
        found = []
        for pool, halves in itertools.product(pools, (False, True)):
            sums = [np.zeros((width, width), np.float32) for _ in range(2)] + [
                np.zeros(width, np.float32) for _ in range(2)
            ]
            core.add_moments(
                pool, bf16(x) if halves else x, sums[0], sums[2], sums[3], bf16(y) if halves else y, sums[1]
            )
            found.append(sums)
            of_x, of_y = wide(bf16(x)), wide(bf16(y)) if halves else y
            close(np.triu(sums[0]), np.triu(of_x.T @ of_x), 3e-6, "products", tokens, width)
            change = wide(bf16((of_y - of_x).astype(np.float32)))
            close(sums[1], change.T @ of_x, 3e-6, "drift", tokens, width)
            assert (sums[2] == np.abs(of_x).max(0)).all()
            close(sums[3], np.abs(of_x).sum(0), 1e-6, "sizes", tokens, width)
        for one, other in zip(found[:2], found[2:], strict=True):  # for any number of threads
            assert all(
                (np.triu(a) == np.triu(b)).all() if a.ndim == 2 and i == 0 else (a == b).all()
                for i, (a, b) in enumerate(zip(one, other, strict=True))
            )
    x = np.zeros((4, 8), np.float32)
    right = {
        "x": x,
        "products": np.zeros((8, 8), np.float32),
        "largest": np.zeros(8, np.float32),
        "sizes": np.zeros(8, np.float32),
    }
    wrong: list[dict[str, Any]] = [
        {"products": np.zeros((8, 7), np.float32)}, {"largest": np.zeros(7, np.float32)}, {"sizes": np.zeros(9, np.float32)}, {"y": x},
        {"drift": np.zeros((8, 8), np.float32)}, {"y": x[:3], "drift": np.zeros((8, 8), np.float32)}, {"x": x.astype(np.float64)},
    ]  # fmt: skip
    for change in wrong:
        refused(lambda change=change: core.add_moments(pools[0], **{**right, **change}))
    x[1, 2] = np.nan
    core.add_moments(pools[0], **right)
    assert np.isnan(right["largest"][2]) and np.isnan(right["products"][2, 5]) and not np.isnan(right["largest"][3])


def causal(core: Any) -> None:
    """Attention of windows to themselves."""
    if not core.multiplies_bfloat16():
        return
    pools = [core.ThreadPool(n) for n in (1, 3)]
    for windows, heads, key_heads, tokens, width in (
        (1, 3, 3, 1, 2),
        (2, 4, 2, 70, 16),
        (1, 2, 1, 200, 80),
        (1, 3, 1, 97, 64),
    ):
        begin("causal", heads, tokens, width)
        q, k, v = (bf16(rng.standard_normal((windows, n, tokens, width))) for n in (heads, key_heads, key_heads))
        found = [np.zeros_like(q) for _ in pools]
        for pool, out in zip(pools, found, strict=True):
            core.causal_attention(pool, q, k, v, 0.3, out)
        assert (found[0] == found[1]).all()
        keys, values = (np.repeat(wide(t), heads // key_heads, 1) for t in (k, v))
        scores = 0.3 * wide(q) @ keys.swapaxes(2, 3) + np.where(np.tri(tokens) > 0, 0, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        close(wide(found[0]), shares / shares.sum(-1, keepdims=True) @ values, 4e-3, "causal", heads, tokens, width)
    q = np.zeros((1, 2, 4, 6), np.uint16)
    odd = np.zeros((1, 2, 4, 5), np.uint16)
    for of_q, of_k, of_v, out in (
        (q, q[:, :, :3], q[:, :, :3], q),
        (q, q, q[:, :1], q),
        (q, q, q, odd),
        (odd, odd, odd, odd),
    ):
        refused(
            lambda a=of_q, b=of_k, c=of_v, d=out: core.causal_attention(
                pools[0], a.copy(), b.copy(), c.copy(), 1.0, d.copy()
            )
        )


def fits(core: Any) -> None:
    """Scales, offsets and codes of matrices whose rows are no multiple of anything, by every set of instructions and number of threads."""
    table = [(-3.0, -2.0, 1), (-1.0, -0.5, 0), (0.0, 0.4, 2), (0.8, np.inf, 3)]
    pools = [core.ThreadPool(1), core.ThreadPool(3)]
    every = itertools.product(
        ("absmax", "minmax", "search"), (1, 5, 16, 33, 200), ("int", "table"), (None, "columns", "elements")
    )
    for kind, size, grid, weighed in every:
        if grid == "table" and kind == "minmax":
            continue
        begin("fits", kind, size, grid, weighed)
        x = rng.normal(size=(19, 203 if size < 200 else 401)).astype(np.float32)
        x[2], x[3, :40] = 0, 0
        rows, cols = x.shape
        size = min(size, cols)
        count = rows * -(-cols // size)
        affine = kind == "minmax" or (kind == "search" and grid == "int" and size != 33)
        levels = (
            core.Levels(-3.0, 0.8, table)
            if grid == "table"
            else core.Levels(0.0, 15.0)
            if affine
            else core.Levels(-8.0, 7.0)
        )
        spec = core.FitSpec(
            kind=kind, grid=levels, offset="min" if affine else "", scale_store="fp16", offset_store="bf16" if affine else "",
            two_signs=not affine, reach=0.8 if grid == "table" else 7.0, extreme=-3.0 if grid == "table" else -8.0,
            factors=[0.7, 0.9, 1.1] if kind == "search" else [],
        )  # fmt: skip
        given = {"columns": cols, "elements": rows * cols}
        v = None if weighed is None else rng.uniform(0.1, 1, given[weighed]).astype(np.float32)
        found = []
        for pool, isa, (name, values) in itertools.product(
            pools, core.isas(), (("fp32", x), ("fp16", x.astype(np.float16)), ("bf16", (x.view(np.uint32) >> 16).astype(np.uint16)))
        ):  # fmt: skip
            place = (values.ctypes.data, name, rows, cols, size)
            scale, offset, constant = (np.empty(count, np.float32) for _ in range(3))
            zeros = np.empty(count, np.uint8)
            others = (offset, constant, zeros) if affine else (None, constant, None)
            said = core.fit_blocks(spec, pool, isa, *place, scale, *others, v, weighed is None)
            assert said[0] and said[1] and np.isfinite(scale).all()
            codes = np.empty(rows * cols, np.uint8)
            steps = (scale, offset if affine else None)
            norm, error = core.round_blocks(levels, pool, isa, *place, *steps, False, 0, codes)
            assert error < norm and codes.max() < 16
            close(norm, float((x.astype(np.float64) ** 2).sum()), 0.02, kind, size, isa)
            peaks = np.empty(count, np.float32)
            core.block_peaks(pool, isa, *place, peaks)
            close(peaks.max(), np.abs(x).max(), 0.01, kind, size, isa)
            if name == "fp32":
                found.append((scale, codes, error))
        for scale, codes, error in found[1:]:
            assert (scale == found[0][0]).all() and (codes == found[0][1]).all(), (kind, size, grid)
            close(error, found[0][2], 1e-5, kind, size)
    packed_codes(core, pools[1])
    place = (x.ctypes.data, "fp32", rows, cols, size)
    refused(core.fit_blocks, spec, pools[0], "", *place, scale[1:], *others, v, False)
    refused(core.fit_blocks, spec, pools[0], "none", *place, scale, *others, v, False)
    refused(core.fit_blocks, spec, pools[0], "", x.ctypes.data, "fp8", *place[2:], scale, *others, v, False)
    refused(core.round_blocks, levels, pools[0], "", *place, *steps, False, 4, codes)
    refused(core.block_peaks, pools[0], "", *place, peaks[1:])
    refused(core.Levels, 0.0, 256.0)
    refused(core.FitSpec, kind="none", grid=levels)


def packed_codes(core: Any, pool: Any) -> None:
    """Codes of every width, as a stream of bits, against numpy's."""
    for bits, isa in itertools.product((-3, 1, 2, 3, 4, 5, 6, 7, 8), core.isas()):
        begin("packed", bits)
        top = 2 if bits == -3 else 2**bits - 1
        right = rng.integers(0, top + 1, (7, 120), dtype=np.uint8)
        x, scale = right.astype(np.float32), np.ones(7, np.float32)
        codes = np.empty(7 * (24 if bits == -3 else 15 * bits), np.uint8)
        core.round_blocks(
            core.Levels(0.0, float(top)), pool, isa, x.ctypes.data, "fp32", 7, 120, 120, scale, None, False, bits, codes
        )
        if bits == -3:
            digits = [codes // 3**k % 3 for k in range(5)]
            assert (np.stack(digits, 1).reshape(7, 120) == right).all()
        else:
            stream = np.unpackbits(right.reshape(-1, 1), axis=1, bitorder="little")[:, :bits]
            assert (np.packbits(stream.reshape(-1), bitorder="little") == codes).all(), (bits, isa)


PARTS = {
    part.__name__: part
    for part in (kernels, spread, joined, decoder, stores, interrupted, sampler, limits, fits, solvers, moments, causal)
}

if __name__ == "__main__":
    PARTS[sys.argv[2]](load(sys.argv[1]))
