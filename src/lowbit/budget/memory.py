"""What running a model takes: its weights, its KV cache, and the rest of the program."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.planning.kv_cache import KVCache

# Beside weights and KV cache: Python with PyTorch or a device context, and the activations of a batch of one.
OVERHEAD = 600_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes while a model runs. weights: of its files; cache: keys and values; working: everything else."""

    weights: int
    cache: int
    working: int

    @property
    def beside(self) -> int:
        """Bytes beside the weights."""
        return self.cache + self.working

    @property
    def total(self) -> int:
        return self.weights + self.beside


def running_memory(weights: int, kv: KVCache, context: int, sequences: int = 1, working: int = OVERHEAD) -> Memory:
    """The memory of `weights` bytes with the KV cache of `sequences` of `context` tokens, and `working` bytes beside.

    What `--fit-memory` is held to, and what recommendations count.
    """
    return Memory(weights, kv.bytes_at(context) * sequences, working)


def longest_context(memory: int, weights: int, kv: KVCache, at_most: int, working: int = OVERHEAD) -> int:
    """The most tokens, `at_most` of them, whose KV cache fits into `memory` beside the weights; 0 where none does."""
    low, high = 0, at_most
    while low < high:
        middle = (low + high + 1) // 2
        if running_memory(weights, kv, middle, working=working).total <= memory:
            low = middle
        else:
            high = middle - 1
    return low
