"""What a cache format cost, as numbers."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.measure.quality import Estimate

DECILES = 10


@dataclass(frozen=True)
class Decile:
    """A tenth of the context: positions from `first` to before `last`; KL(float || quantized) in nats per token, and how often both
    name the same next token."""

    first: int
    last: int
    kl: Estimate
    top1: Estimate


@dataclass(frozen=True)
class Depth:
    """Facts that stand at this share of the context: how many were asked, how many the float cache and this one answered, and the
    log-probability of the answers in nats."""

    depth: float
    asked: int
    base_found: int
    found: int
    base_logprob: float
    logprob: float


@dataclass(frozen=True)
class Repetition:
    """Random tokens that come a second time: the loss on the second time, in nats per token, with the float cache and with this one."""

    length: int
    base_loss: Estimate
    loss: Estimate


@dataclass(frozen=True)
class CacheFigures:
    """One cache format, measured beside the float cache.

    name: as it was asked for. bits: of a number on average at the context, all that is kept exactly included; k_bits, v_bits: of keys and of values.
    """

    name: str
    format: str
    bits: float
    k_bits: float
    v_bits: float
    bytes_per_token: float
    perplexity: Estimate
    kl: Estimate
    top1: Estimate
    deciles: tuple[Decile, ...]
    facts: tuple[Depth, ...] = ()
    repetition: Repetition | None = None

    @property
    def worst(self) -> Decile:
        """The tenth of the context with the largest KL."""
        return max(self.deciles, key=lambda decile: decile.kl.value)

    @property
    def asked(self) -> int:
        """Facts that were asked."""
        return sum(depth.asked for depth in self.facts)

    @property
    def found(self) -> int:
        """Facts that were answered right."""
        return sum(depth.found for depth in self.facts)

    @property
    def base_found(self) -> int:
        """Facts that the float cache answered right."""
        return sum(depth.base_found for depth in self.facts)
