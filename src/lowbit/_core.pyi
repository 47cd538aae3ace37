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
def give_back() -> None: ...

class Value(Enum):
    f32 = ...
    f16 = ...
    bf16 = ...

class Pool:
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

class Factor:
    def __init__(
        self,
        weight: Weight,
        planes: int = 2,
        whole: bool = False,
        fixed: float = 0.0,
        divisor: Any | None = None,
        rest: Weight | None = None,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...

class Multiplier:
    def __init__(self, pool: Pool, isa: str = "") -> None: ...
    @property
    def isa(self) -> str: ...
    def linear(self, factor: Factor, x: Any, y: Any, bias: Any | None = None) -> None: ...
    def linear_at(self, factor: Factor, x: int, rows: int, y: int, type: Value, bias: int = 0) -> None: ...

class Decoder:
    def __init__(self, model: dict[str, Any], pool: Pool, isa: str = "") -> None: ...
    def forward(self, cache: Cache, ids: Any, sequence: Any, position: Any, wanted: Any, logits: Any) -> None: ...

class Cache:
    def __init__(self, decoder: Decoder, sequences: int, capacity: int, int8: bool = False) -> None: ...
    @property
    def sequences(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def bytes_per_position(self) -> int: ...

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
def limits(pool: Pool, isa: str = "", bytes: int = 268435456, repeats: int = 3) -> dict[str, float]: ...
