"""What csrc/ gives to Python. Written by hand, so that types are checked where nothing was built; a test compares."""

from collections.abc import Sequence
from enum import Enum
from typing import Any, TypedDict

version: str

class Caches(TypedDict):
    l1d: int
    l2: int
    l3: int

class Features(TypedDict):
    flags: dict[str, bool]
    caches: Caches
    cores: int
    missing: dict[str, list[str]]

def features() -> Features: ...
def isas() -> list[str]: ...

class Value(Enum):
    f32 = ...
    f16 = ...
    bf16 = ...

class ThreadPool:
    def __init__(self, threads: int, openmp: tuple[int, int, int] | None = None) -> None: ...
    @property
    def threads(self) -> int: ...

class Weight:
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def segment(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def unpack_row(self, row: int, out: Any) -> None: ...

def pack(
    bits: int,
    group: int,
    zero: int,
    sources: Sequence[tuple[Any, Any, Any | None]],
    table: Any | None = None,
    paired: bool = False,
    segment: int = 0,
) -> Weight: ...
def pack_floats(type: str, sources: Sequence[Any], paired: bool = False) -> Weight: ...

class ActivationSpec:
    def __init__(
        self, *, bits: int = 15, per_token: bool = False, static_scale: float = 0.0, divisor: Any | None = None
    ) -> None: ...

class Factor:
    def __init__(
        self, weight: Weight, activations: ActivationSpec | None = None, residual: Weight | None = None
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...

class Multiplier:
    def __init__(self, pool: ThreadPool, isa: str = "") -> None: ...
    @property
    def isa(self) -> str: ...
    def linear(self, factor: Factor, x: Any, y: Any, bias: Any | None = None) -> None: ...
    def linear_at(self, factor: Factor, x: int, rows: int, y: int, type: Value, bias: int = 0) -> None: ...

class Gate(Enum):
    silu = ...
    gelu_tanh = ...
    gelu = ...

class PartSpec:
    def __init__(
        self,
        *,
        weight: Weight,
        residual: Weight | None = None,
        activations: ActivationSpec,
        bias: Any | None = None,
        offset: int = 0,
    ) -> None: ...

class ProjectionSpec:
    def __init__(self, *, cols: int, width: int, parts: Sequence[PartSpec]) -> None: ...

class MlpSpec:
    def __init__(self, *, gate_up: ProjectionSpec, down: ProjectionSpec) -> None: ...

class ExpertsSpec:
    def __init__(self, *, router: ProjectionSpec, experts: Sequence[MlpSpec], top_k: int, normalized: bool) -> None: ...

class LayerSpec:
    def __init__(
        self,
        *,
        qkv: ProjectionSpec,
        output: ProjectionSpec,
        mlp: MlpSpec | None = None,
        experts: ExpertsSpec | None = None,
        attention_norm: Any | None = None,
        mlp_norm: Any | None = None,
        attention_post_norm: Any | None = None,
        mlp_post_norm: Any | None = None,
        query_norm: Any | None = None,
        key_norm: Any | None = None,
        rope: int,
        window: int,
    ) -> None: ...

class RopeSpec:
    def __init__(self, *, inverse_frequency: Any, factor: float = 1.0, interleaved: bool = False) -> None: ...

class ModelSpec:
    def __init__(
        self,
        *,
        width: int,
        heads: int,
        key_heads: int,
        head_dim: int,
        vocabulary: int,
        epsilon: float,
        attention_scale: float,
        attention_soft_cap: float = 0.0,
        logit_soft_cap: float = 0.0,
        logit_scale: float = 1.0,
        embedding_scale: float = 1.0,
        residual_scale: float = 1.0,
        gate: Gate,
        embedding: Weight,
        final_norm: Any | None,
        head: ProjectionSpec,
        layers: Sequence[LayerSpec],
    ) -> None: ...
    @property
    def weights(self) -> list[Weight]: ...

class Decoder:
    def __init__(self, model: ModelSpec, ropes: Sequence[RopeSpec], pool: ThreadPool, isa: str = "") -> None: ...
    def forward(self, cache: KVCache, ids: Any, sequence: Any, position: Any, wanted: Any, logits: Any) -> None: ...

class KVSide:
    def __init__(
        self,
        *,
        bits: int = 16,
        low: int = 0,
        count: int = 0,
        levels: Sequence[int] = [],
        bounds: Sequence[float] = [],
        unit: float = 1.0,
        group: int = 0,
        tokens: int = 1,
        offset: str = "none",
        fit: str = "absmax",
        reach: float = 1.0,
        rotate: bool = False,
    ) -> None: ...

class KVLayer:
    def __init__(self, *, keys: KVSide, values: KVSide, sinks: int = 0, recent: int = 0) -> None: ...

class KVCache:
    def __init__(self, decoder: Decoder, sequences: int, capacity: int, layers: Sequence[KVLayer] = []) -> None: ...
    @property
    def sequences(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def bytes_per_position(self) -> int: ...
    @property
    def exact_bytes(self) -> int: ...
    @property
    def piece(self) -> int: ...
    def can_go_on(self, sequence: int, position: int) -> bool: ...

class Random:
    def __init__(self, seed: int) -> None: ...

def sample(
    logits: Any,
    random: Random,
    seen: Any | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> int: ...
def limits(pool: ThreadPool, isa: str = "", bytes: int = 268435456, repeats: int = 3) -> dict[str, float]: ...
def multiplies_bfloat16() -> bool: ...
def add_moments(
    pool: ThreadPool,
    x: Any,
    products: Any,
    largest: Any,
    sizes: Any,
    y: Any | None = None,
    drift: Any | None = None,
) -> None: ...
def causal_attention(pool: ThreadPool, q: Any, k: Any, v: Any, scale: float, out: Any) -> None: ...

class Offsets(Enum):
    none = ...
    points = ...
    minima = ...

class GridLevels:
    def __init__(self, integers: tuple[int, int] | None = None, table: tuple[Any, Any, Any] | None = None) -> None: ...

def solve(
    pool: ThreadPool,
    isa: str,
    levels: GridLevels,
    offsets: Offsets,
    group: int,
    target: Any,
    scale: Any,
    offset: Any | None,
    hessian: Any,
    order: Any,
    still: Any | None,
    codes: Any,
    error: Any,
    *,
    feed: tuple[Any, Any | None, Any] | None = None,
    rounds: int = 0,
    refit: bool = False,
    signed_scales: bool = True,
    scale_store: str = "fp32",
    offset_store: str = "fp32",
    most_kept: int = 25165824,
) -> None: ...

class Levels:
    def __init__(self, lo: float, hi: float, table: Sequence[tuple[float, float, int]] | None = None) -> None: ...

class FitSpec:
    def __init__(
        self,
        *,
        kind: str,
        grid: Levels,
        offset: str = "",
        scale_store: str = "",
        offset_store: str = "",
        spans_zero: bool = False,
        signed_scale: bool = True,
        two_signs: bool = False,
        reach: float = 1.0,
        extreme: float = 1.0,
        factors: Sequence[float] | None = None,
    ) -> None: ...

def fit_blocks(
    fit: FitSpec,
    pool: ThreadPool,
    isa: str,
    x: int,
    type: str,
    rows: int,
    cols: int,
    size: int,
    scale: Any,
    offset: Any | None,
    constant: Any,
    zeros: Any | None,
    importance: Any | None = None,
    magnitude: bool = False,
) -> tuple[bool, bool, bool]: ...
def round_blocks(
    levels: Levels,
    pool: ThreadPool,
    isa: str,
    x: int,
    type: str,
    rows: int,
    cols: int,
    size: int,
    scale: Any,
    offset: Any | None,
    minimum: bool,
    bits: int,
    codes: Any,
) -> tuple[float, float]: ...
def block_peaks(pool: ThreadPool, isa: str, x: int, type: str, rows: int, cols: int, size: int, peaks: Any) -> None: ...
