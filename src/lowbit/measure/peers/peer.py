"""What a peer is: a program that is not lowbit's, which `bench` measures in the same rounds. Peers are found by registration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lowbit.discovery import modules_of
from lowbit.measure.backends import Backend

Opener = Callable[[], Backend]
Peer = Callable[[Mapping[str, Any], int], list[Opener]]
"""From what `bench` was asked for of other programs, by the names of its parameters, and the threads that each gets: what opens
those that this peer knows. RecipeError or SourceError for what cannot be, before anything is opened."""

_PEERS: list[Peer] = []


def peer(function: Peer) -> Peer:
    """Register a peer. A decorator."""
    _PEERS.append(function)
    return function


def openers(asked: Mapping[str, Any], threads: int) -> list[Opener]:
    """What opens every program that was asked for, in alphabetical order of their files."""
    modules_of("lowbit.measure.peers")
    return [opener for find in _PEERS for opener in find(asked, threads)]
