"""How much of the rounding errors of a layer remains where a solver feeds them back, from what the layer reads.

GPTQ, GPTAQ and Qronos round a weight column by column and let the columns that are left make up for each error. Of the error of
column j then remains what those columns cannot stand in for: with H = E[x x'] in the order of rounding and H = R R', R
upper triangular, R_jj^2 in place of H_jj (Frantar et al. 2022, "GPTQ", equation 3, where [H^-1]_jj of the columns from j on is
1 / R_jj^2). Inputs whose channels resemble each other leave 2 % of it, others half, so that a layer which is sensitive to
rounding may bear few bits well. No candidate is solved for it: one forward over a few thousand tokens serves them all.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.blockwise.capture import InputCapture
from lowbit.interchange.hf.running import evaluating
from lowbit.solvers.stats import StatsBuilder

_DAMP = 0.01  # of the mean of the diagonal, as solvers have it
_PER_COLUMN = 1.5  # tokens that a column needs; with fewer, columns are seen in parts that have as many
_FEWEST = 32  # columns that such a part has
_BLOCK = re.compile(r"^.*?\.\d+\.")


def remaining_errors(
    model: nn.Module, weights: Mapping[str, Tensor], sequences: Sequence[Tensor], autocast: bool
) -> dict[str, Tensor]:
    """Name -> float64 [in]: the share of each input's error that remains; what was not multiplied with an input lacks.

    `weights`: parameters of `model`, 2-D or stacks of experts, whose inputs are taken together. `sequences` [length]
    each run at once, so that only the block that is running has its moments in memory.
    """
    places = Counter(w.untyped_storage().data_ptr() for w in weights.values())
    alone = {name: w for name, w in weights.items() if places[w.untyped_storage().data_ptr()] == 1}
    found = _Inputs(autocast)
    ids = torch.stack(list(sequences)).to(next(iter(weights.values())).device)
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {k: v for k, v in (("use_cache", False), ("logits_to_keep", 1)) if k in known}
    seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    half = torch.autocast(ids.device.type, torch.bfloat16) if autocast else nullcontext()
    with evaluating(model), _one_product_an_expert(model), half, InputCapture(alone, found.add):
        model(ids, **({"labels": ids} if seq2seq else {}), **options)
    return found.finished()


@contextmanager
def _one_product_an_expert(model: nn.Module) -> Iterator[None]:
    """Experts of transformers multiplied one after the other, so that each product is seen."""
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    able = hasattr(model, "set_experts_implementation") and before is not None
    try:
        if able:
            with suppress(ValueError):
                model.set_experts_implementation("eager")  # type: ignore[operator]
        yield
    finally:
        if able:
            with suppress(ValueError):
                model.set_experts_implementation(before)  # type: ignore[operator]


def tokens_needed(weights: Mapping[str, Tensor], transposed: Mapping[str, bool]) -> int:
    """How many tokens `remaining_errors` should see: 8192 at most, however wide a layer is."""
    widths = [w.shape[-2 if transposed[name] else -1] for name, w in weights.items()]
    return min(8192, max(1024, int(_PER_COLUMN * max(widths, default=0))))


class _Inputs:
    """Sums of x'x for each input, by the names that read it, until the next block begins."""

    def __init__(self, half: bool) -> None:
        self.half = half
        self.sums: dict[str, list[StatsBuilder]] = {}
        self.readers: dict[str, str] = {}  # name -> the first that read the same input
        self.shares: dict[str, Tensor | None] = {}
        self.last: tuple[str, Tensor] | None = None
        self.block = ""

    def add(self, name: str, expert: int | None, x: Tensor) -> None:
        """One product of a weight with `x` [..., in]."""
        block = found[0] if (found := _BLOCK.match(name)) else ""
        if block != self.block:
            self._close()
            self.block = block
        if self.last is not None and self.last[1] is x and name not in self.sums:
            self.readers.setdefault(name, self.readers.get(self.last[0], self.last[0]))
        if name in self.shares or name in self.readers:
            return
        with torch.autocast(x.device.type, enabled=False):
            self._sum(name, x.detach().reshape(-1, x.shape[-1]))
        self.last = (name, x)

    def finished(self) -> dict[str, Tensor]:
        """The shares of all names; those of which too few tokens were seen get the mean of the others."""
        self._close()
        known = [float(s.mean()) for s in self.shares.values() if s is not None]
        usual = sum(known) / max(1, len(known))
        shares = {name: torch.full((1,), usual) if s is None else s for name, s in self.shares.items()} if known else {}
        return {
            name: shares[first]
            for name in (*self.shares, *self.readers)
            if (first := self.readers.get(name, name)) in shares
        }

    def _sum(self, name: str, x: Tensor) -> None:
        width = x.shape[-1]
        if name not in self.sums:
            # Of experts the first decides; each of them sees but a part of the tokens, their sum sees them all.
            parts = min(max(1, width // _FEWEST), max(1, round(_PER_COLUMN * width / max(1, len(x)) + 0.49)))
            self.sums[name] = [StatsBuilder(len(range(i, width, parts)), half=self.half) for i in range(parts)]
        parts = len(self.sums[name])
        for i, part in enumerate(self.sums[name]):
            part.add(x[:, i::parts])

    def _close(self) -> None:
        """The inputs of the block that has ended, to shares."""
        for name, parts in self.sums.items():
            width, share = sum(len(p.absmax) for p in parts), None
            if all(p.tokens > len(p.absmax) for p in parts):
                share = torch.empty(width, dtype=torch.float64)
                for i, part in enumerate(parts):
                    share[i :: len(parts)] = _shares(part)
            self.shares[name] = share
        self.sums, self.last = {}, None


def _shares(inputs: StatsBuilder) -> Tensor:
    """float64 [in]: R_jj^2 / H_jj, the most important column first. Few tokens are fitted by chance: what is left of a column
    after k others is too small by the factor (n - k) / n, but for the damping, and one that is mostly damping counts less than 1."""
    moment = inputs.stats().second_moment.double()
    diagonal = moment.diagonal()
    damp = _DAMP * float(diagonal.mean().clamp_min(1e-30))
    diagonal += damp
    backwards = torch.argsort(diagonal, stable=True)
    lower, failed = torch.linalg.cholesky_ex(moment[backwards][:, backwards])
    share = torch.ones_like(diagonal)
    if not int(failed):
        unseen = (lower.diagonal().square() - damp).clamp_min(0)
        free = unseen / (unseen + damp)
        unseen = unseen * inputs.tokens / (inputs.tokens - (free.cumsum(0) - free))
        share[backwards] = ((damp + unseen) / diagonal[backwards]).clamp_max(1.0)
    return share
