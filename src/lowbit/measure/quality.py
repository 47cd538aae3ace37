"""What quantizing cost in quality: perplexity, divergence and agreement.

With p the float model's distribution of the next token and q the other's:

- perplexity = exp(mean of -log q(token));
- KL(p || q) = sum_v p(v) (log p(v) - log q(v)), in nats per token;
- top-1 agreement = share of tokens where both name the same most likely token.

Both models see a window right after one another and their logits are compared at once, a few rows
at a time and in float64, so that neither a file of logits nor a second copy of them is needed.

A standard error is that of a mean over windows, since tokens of a window are not independent. Over few windows that error is itself
a matter of luck: two windows that happen to agree would claim an error near zero. With fewer than 8 windows it is therefore the larger of two:
that over windows, and that over blocks of at least 64 consecutive tokens which are taken as independent (the method of batch means,
see Flegal and Jones 2010, "Batch means and spectral variance estimators in Markov chain Monte Carlo"). One window is judged by its blocks alone.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.blockwise.hidden_states import TensorFile
from lowbit.errors import SourceError
from lowbit.kernels.heap import trim
from lowbit.measure.kept import NOTHING_KEPT, Figures, Kept
from lowbit.measure.scoring import Scorer, WindowScorer
from lowbit.measure.windows import Windows

Progress = Callable[[int, int], None]
HowMany = Callable[[int, Callable[[int], "Quality"]], int]
"""How many windows to measure, given how many are done and what gives the quality of the first N of those."""
_ENOUGH = 8  # windows, from which their own spread is known well enough
_BLOCK = 64  # tokens of a block at least


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, which is None where less than two blocks of tokens were measured (see above)."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class Quality:
    """Quality of one model, compared with a base model when there was one.

    `kind` is how it was scored (see scoring.py); `tokens` how many tokens were; `program`: what computed the logits and in which type,
    where that is known.
    """

    kind: str
    windows: int
    length: int
    tokens: int
    perplexity: Estimate
    base_perplexity: Estimate | None = None
    ratio: Estimate | None = None
    kl_mean: Estimate | None = None
    kl_p99: Estimate | None = None
    top1: Estimate | None = None
    program: str | None = None


@dataclass
class Reference:
    """The base model's logits, window by window.

    Up to `keep_bytes` of them are kept, in a file in `folder`, so that measuring many recipes against one base does not repeat its
    forward, and memory holds those of one window.
    """

    model: nn.Module | WindowScorer
    windows: Windows
    keep_bytes: int = 0
    folder: Path | None = None
    _numbers: dict[int, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.scorer = _scorer(self.model)
        self.scorer.check(self.windows.ids)
        self._kept = TensorFile(self.folder or Path(tempfile.gettempdir()))

    def logits(self, index: int) -> Tensor:
        """Logits [S, vocabulary] of one window."""
        if index in self._numbers:
            return self._kept.read(self._numbers[index])
        logits = self.scorer.logits(self.windows.ids[index], self.windows.frame)
        if self._kept.nbytes + logits.nbytes <= self.keep_bytes:
            self._numbers[index] = self._kept.append(logits.cpu())
        return logits


def measure_quality(
    model: nn.Module | WindowScorer, windows: Windows, *, base: nn.Module | WindowScorer | Reference | None = None,
    progress: Progress | None = None, how_many: HowMany | None = None, kept: Kept = NOTHING_KEPT,
) -> Quality:  # fmt: skip
    """Quality of `model` on `windows`, compared with `base` when given. Models may be on different devices.

    how_many: asked before the first window and after each, of how many the quality is to be; all of them when None. Those beyond what
    it says at last are left out. kept: windows that it has are not measured again.

    Raises SourceError when a model gives no logits for every token, or the two cannot be compared.
    """
    scorer = _scorer(model)
    scorer.check(windows.ids)
    reference = base if isinstance(base, Reference) or base is None else Reference(base, windows)
    if reference is not None and reference.scorer.kind != scorer.kind:
        raise SourceError(
            f"a {scorer.kind} model cannot be compared with a {reference.scorer.kind} one: load both alike"
        )
    known, parts = kept.figures(windows.count), list[Figures]()

    def so_far(count: int) -> Quality:
        return quality_of(scorer.kind, windows, parts[:count])

    def wanted() -> int:
        return windows.count if how_many is None else min(windows.count, how_many(len(parts), so_far))

    def measured(index: int) -> Figures:
        ids = windows.ids[index]
        against = reference.logits(index) if reference is not None else None
        is_base = reference is not None and reference.model is model
        logits = scorer.logits(ids, windows.frame) if against is None or not is_base else against
        found = compare_logits(logits, scorer.targets(ids, windows.frame), against)
        check_base(found)
        kept.add(index, found)
        del logits, against
        trim()
        return found

    count = wanted()
    while len(parts) < count:
        index = len(parts)
        parts.append(known.get(index) or measured(index))
        count = wanted()
        if progress is not None:
            progress(min(index + 1, count), count)
    return so_far(count)


def check_base(figures: Figures) -> None:
    """SourceError for a float model whose logits are not finite."""
    if "base_nll" in figures and not np.isfinite(figures["base_nll"]).all():
        raise SourceError("the base model gives logits that are not finite: it cannot be compared with")


def _scorer(model: nn.Module | WindowScorer) -> WindowScorer:
    return Scorer.of(model) if isinstance(model, nn.Module) else model


def compare_logits(logits: Tensor, targets: Tensor, base: Tensor | None = None) -> Figures:
    """Figures of each token, float64 [S]: nll, and with `base` also base_nll, kl and top1.

    logits and base [S, vocabulary] in any float dtype, targets [S]. Works on a few rows at a time:
    beyond its input it needs some 4 MiB on a CPU.
    """
    if base is not None and base.shape != logits.shape:
        raise SourceError(
            f"the models have {logits.shape[-1]} and {base.shape[-1]} tokens: compare copies of one model"
        )
    # Few enough rows to stay in the cache of a CPU, enough to fill a GPU. MPS has no float64.
    device = torch.device("cpu") if logits.device.type == "mps" else logits.device
    rows = max(1, (2**17 if device.type == "cpu" else 2**25) // logits.shape[-1])
    targets = targets.to(device)
    # Made beforehand: small tensors that stay between large ones that go would keep the memory of the latter from the system.
    names = ("nll",) if base is None else ("nll", "base_nll", "top1", "kl")
    found = {name: np.empty(logits.shape[0]) for name in names}
    for start in range(0, logits.shape[0], rows):
        chunk = slice(start, start + rows)
        q = _Rows(logits[chunk].to(device), targets[chunk, None])
        found["nll"][chunk] = q.nll.cpu().numpy()
        if base is not None:
            p = _Rows(base[chunk].to(device), targets[chunk, None])
            found["base_nll"][chunk] = p.nll.cpu().numpy()
            found["top1"][chunk] = (p.top == q.top).double().cpu().numpy()
            found["kl"][chunk] = _divergence(p, q).cpu().numpy()
    return found


class _Rows:
    """A softmax in parts, all float64: `shifted` = logits - their maximum, `exp` of it, and `log_sum`
    of that, so that log softmax = shifted - log_sum. `top` is the place of the maximum."""

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        largest, self.top = logits.max(dim=-1)
        self.shifted = logits.double() - largest.double()[:, None]
        self.exp = self.shifted.exp()
        self.log_sum = self.exp.sum(-1).log()
        self.nll = self.log_sum - self.shifted.gather(1, targets)[:, 0]


def _divergence(p: _Rows, q: _Rows) -> Tensor:
    """KL(p || q) of each row, with 0 log 0 = 0."""
    difference = p.shifted - q.shifted
    total = torch.linalg.vecdot(p.exp, difference)
    if not bool(torch.isfinite(total).all()):  # tokens that a model rules out have a logit of -inf
        total = torch.where(p.exp == 0, 0.0, p.exp * difference).sum(-1)
    return total * (-p.log_sum).exp() - p.log_sum + q.log_sum


def quality_of(kind: str, windows: Windows, parts: Sequence[Figures]) -> Quality:
    """What the figures of some windows, in order, say together."""
    figures = {name: np.stack([part[name] for part in parts]) for name in parts[0]}  # [windows, tokens of a window]
    nll = figures["nll"]
    perplexity = _exponential(mean_estimate(nll))
    shape = (kind, nll.shape[0], windows.length, nll.size)
    if "kl" not in figures:
        return Quality(*shape, perplexity)
    return Quality(
        *shape,
        perplexity,
        base_perplexity=_exponential(mean_estimate(figures["base_nll"])),
        # From the differences: what both models find hard cancels, and the error is far smaller.
        ratio=_exponential(mean_estimate(nll - figures["base_nll"])),
        kl_mean=mean_estimate(figures["kl"]),
        kl_p99=_quantile(figures["kl"], 0.99),
        top1=mean_estimate(figures["top1"]),
    )


def mean_estimate(values: np.ndarray) -> Estimate:
    """Mean of [windows, tokens], with the standard error of the mean: over windows, and of few windows over blocks of tokens too."""
    means = values.mean(axis=1)
    errors = [_error(means)]
    if len(means) < _ENOUGH:
        blocks = np.array_split(values, max(1, values.shape[1] // _BLOCK), axis=1)
        errors.append(_error(np.concatenate([block.mean(axis=1) for block in blocks])))
    known = [error for error in errors if error is not None]
    return Estimate(float(means.mean()), float(np.max(known)) if known else None)


def _error(means: np.ndarray) -> float | None:
    """The standard error of the mean of independent values, None for a single one; NaN where one is infinite."""
    with np.errstate(invalid="ignore"):
        return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None


def _exponential(mean: Estimate) -> Estimate:
    """exp of an estimate; its standard error by the delta method, exp(m) * stderr(m)."""
    with np.errstate(over="ignore"):
        value = float(np.exp(mean.value))
    return Estimate(value, None if mean.stderr is None else value * mean.stderr)


def _quantile(values: np.ndarray, level: float) -> Estimate:
    """Quantile of all tokens; its standard error after Woodruff (1952).

    The error of the share of tokens at or below the quantile, found as for a mean, is carried
    to the values: half the distance of the quantiles one such error above and below.
    """
    if not np.isfinite(values).all():
        return Estimate(math.nan)
    quantile = float(np.quantile(values, level))
    share = mean_estimate((values <= quantile).astype(np.float64))
    if share.stderr is None:
        return Estimate(quantile)
    low, high = np.quantile(values, np.clip([level - share.stderr, level + share.stderr], 0.0, 1.0))
    return Estimate(quantile, float(high - low) / 2)
