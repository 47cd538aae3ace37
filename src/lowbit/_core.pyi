"""What csrc/ gives to Python. Written by hand, so that types are checked where nothing was built; a test compares."""

from typing import TypedDict

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
