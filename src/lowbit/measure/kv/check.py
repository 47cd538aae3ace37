"""lowbit.check_kv: cache formats measured beside the float cache before anybody uses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.text import load_text
from lowbit.errors import RecipeError, SourceError
from lowbit.interchange.hf.text_config import text_config
from lowbit.interchange.progress import heard
from lowbit.kv import CacheFormat
from lowbit.kv.calibrating import calibrate
from lowbit.kv.folder import read_cache_format, read_cache_tables
from lowbit.measure.card import TextMark
from lowbit.measure.kv.allocate import CANDIDATES, best, search
from lowbit.measure.kv.drift import Drift, drifts
from lowbit.measure.kv.figures import CacheFigures, Depth, Repetition
from lowbit.measure.kv.result import CacheCheck, Recommended
from lowbit.measure.kv.runner import Runner
from lowbit.measure.kv.sensitivity import Sensitivity, measure_sensitivity
from lowbit.measure.kv.size import cache_bytes
from lowbit.measure.kv.stored import Cache, FormatCache
from lowbit.measure.kv.tasks import Questions, questions, repetition, retrieval
from lowbit.measure.quality import Progress
from lowbit.measure.subject import folder_of, open_subject, type_of
from lowbit.measure.windows import Tokens, Windows
from lowbit.pipeline.api import Quantized
from lowbit.pipeline.loading import as_dtype

CONTEXT, WINDOWS, LIMIT = 4096, 2, 0.01
FORMATS = ("int8", "int4", "int4:g32", "rotate+search@int4:g32", "kivi2")
_SHORT, _FEW = 512, 2  # tokens and windows of the measurement of each layer
_CALIBRATED = 8  # such windows for formats that are calibrated
_REPEATED = 256  # tokens
_SHORTEST = 32  # tokens of a context
RECOMMENDED, OWN = "recommended", "its own"


def check_kv(
    model: str | Path | nn.Module | Quantized,
    kv: str | CacheFormat | Sequence[str | CacheFormat] | None = None,
    text: str | Path | Sequence[str] | None = None,
    *,
    context: int | None = None,
    windows: int = WINDOWS,
    kl: float = LIMIT,
    recommend: bool = True,
    candidates: Sequence[str] = CANDIDATES,
    tokenizer: Any = None,
    dtype: torch.dtype | str | None = None,
    progress: Progress | bool | None = None,
    told: Callable[[str], None] | None = None,
) -> CacheCheck:
    """What storing keys and values in few bits costs a model over a long context, beside its float cache.

    model: any name of a model, a folder that lowbit wrote, a module of transformers, or what `quantize` returned. kv: cache formats to
    measure; some usual ones, and what a folder is run with, when None. text: a file, strings, a dataset id; None is the offline default. context: tokens of a window,
    4096 or what the model and the text have where that is less; windows: how many of them.

    Of each format: perplexity, KL(float cache || this one) in nats per token and agreement of the first choice by tenths of the
    context, with standard errors; facts planted at five depths and asked at the end; a random sequence that comes again.
    recommend: also measure what each layer loses by its keys and by its values, and find the fewest bits whose KL, measured as a whole, is at
    most `kl`; `candidates` are tried for each. All positions are computed at once, and equal what decoding token by token reads
    (`measure/kv/attention.py`); models with attention of their own go token by token, which a note says.

    tokenizer: in place of the model's own. dtype: what is computed in, float32 when None. `progress(done, in all)` counts windows, and
    `told` hears what is being done.

    SourceError for models that do not predict the next token, TextError for too little text, RecipeError and FormatError for
    formats that there are not.

    >>> found = lowbit.check_kv(quantized, ["int8"], text, context=48, windows=1, recommend=False)
    >>> found.rows[0].kl.value < 0.001  # nats per token
    True
    """
    asked = [kv] if isinstance(kv, (str, CacheFormat)) else FORMATS if kv is None else kv
    formats = {str(one): CacheFormat.of(one) for one in asked}
    _check_numbers(context, windows, kl)
    say, move = told or (lambda what: None), heard(progress) or (lambda done, total: None)
    say("loading the model")
    subject = open_subject(model, tokenizer, as_dtype(dtype) or torch.float32)
    if subject.name is None:
        type_of(subject.module, as_dtype(dtype))
    if subject.tokenizer is None:
        raise SourceError("no tokenizer comes with this model; pass tokenizer=...")
    tok = subject.tokenizer()
    tokens = Tokens.of(load_text(text), tok, subject.module)
    cut = _windows(tokens, context, windows)
    bench = Bench(Runner(subject.module), cut, tokens, tok, say, move)
    notes = [*cut.notes, *bench.notes]
    caches = {name: bench.cache(fmt) for name, fmt in formats.items()}
    if kv is None and (folder := folder_of(model)) is not None:
        caches |= bench.carried(Path(folder))
    rows = bench.rows(caches)
    recommended = sensitivity = None
    if recommend and not bench.runner.parallel:
        notes.append("its layers attend in their own way, so they cannot be told apart, and nothing is recommended")
    elif recommend:
        sensitivity = bench.sensitivity(candidates)
        recommended = bench.recommend(sensitivity, kl)
    return CacheCheck(
        subject.parts.model,
        TextMark.of(cut),
        bench.base_perplexity(),
        tuple(rows),
        recommended,
        sensitivity,
        tuple(notes),
    )


def choose_cache(
    model: str | Path | nn.Module | Quantized, text: Any = None, kl: float = LIMIT, **how: Any
) -> tuple[CacheFormat, CacheCheck]:  # fmt: skip
    """The cache format of fewest bits whose KL from the float cache is at most `kl` nats per token, and what was measured.

    how: context, windows, candidates, tokenizer, progress and told of `check_kv`. SourceError where the model's layers cannot be told apart.
    """
    found = check_kv(model, (), text, kl=kl, **how)
    if found.recommended is None:
        raise SourceError(f"no cache format can be found for {found.model}: {'; '.join(found.notes)}")
    return found.recommended.cache_format, found


def _check_numbers(context: int | None, windows: int, kl: float) -> None:
    if context is not None and context < _SHORTEST:
        raise RecipeError(f"a context of {context} tokens is too short to check a cache on; use {_SHORTEST} or more")
    if windows < 1:
        raise RecipeError(f"{windows} windows were asked for: use 1 or more")
    if not 0 < kl < 10:
        raise RecipeError(f"a KL divergence of {kl:g} is no limit; use a number of nats per token such as {LIMIT:g}")


def _windows(tokens: Tokens, context: int | None, count: int) -> Windows:
    """Windows of the context asked for, or of as many tokens as model and text have."""
    if context is not None:
        return tokens.windows(context, count)
    longest = min(tokens.longest or CONTEXT, CONTEXT, max(_SHORTEST, (len(tokens.ids) + tokens.frame.size) // count))
    return tokens.windows(longest, count)


@dataclass(eq=False)
class Bench:
    """One model with its windows, on which any caches are measured."""

    runner: Runner
    windows: Windows
    tokens: Tokens
    tokenizer: Any
    say: Callable[[str], None] = lambda what: None
    move: Progress = lambda done, total: None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.runner.parallel:
            self.notes.append(
                "its layers attend in their own way, so tokens went through a cache one by one, which takes longer"
            )
        self._base: Drift | None = None
        self._sizes: tuple[dict[int, int], dict[Any, int]] | None = None

    def cache(self, fmt: CacheFormat) -> FormatCache:
        """The cache of a format, with its calibrated tables."""
        if not any(side.calibrated or side.outliers for side in fmt.sides):
            return FormatCache(fmt)
        self.say(f"calibrating {fmt}")
        return FormatCache(fmt, calibrate(self.runner.model, list(self._spare(_CALIBRATED)), fmt))

    def carried(self, folder: Path) -> dict[str, FormatCache]:
        """The cache that a folder says it is run with, under a name for it; nothing where it says none."""
        fmt = read_cache_format(folder)
        if fmt is None or not self.runner.parallel:
            return {}
        heads, widths = self._shapes()
        sizes = {layer: (n, widths[layer, "k"], widths[layer, "v"]) for layer, n in heads.items()}
        return {OWN: FormatCache(fmt, read_cache_tables(folder, fmt, sizes))}

    def rows(self, caches: Mapping[str, FormatCache]) -> list[CacheFigures]:
        """All figures of each format, by the name it was asked for."""
        known = self.measure(list(caches.values()))
        return [self._figures(name, c.format, *one) for (name, c), one in zip(caches.items(), known, strict=True)]

    def measure(self, caches: Sequence[Cache]) -> list[tuple[Drift, tuple[Depth, ...], Repetition | None]]:
        """Drift, facts and repetition of any caches."""
        if not caches:
            return []
        drift = self.drift(caches)
        asked, count = self.asked(), len(caches) + 1
        repeated = self.repeated()
        self.say("asking for facts and repeating a sequence")
        step = self._steps(count * (len(asked) + 2 * (repeated is not None)))
        facts = retrieval(self.runner, asked, caches, step)
        again: Sequence[Repetition | None] = [None] * len(caches)
        if repeated is not None:
            again = repetition(self.runner, *repeated, 2, caches, self.windows.frame, step)
        return list(zip(drift, facts, again, strict=True))

    def drift(self, caches: Sequence[Cache]) -> list[Drift]:
        """Divergence by position of any caches."""
        count = self.windows.count
        self.say(f"measuring {count} window{'' if count == 1 else 's'} of {self.windows.length} tokens")
        step = self._steps(count * (len(caches) + 1))
        found = drifts(self.runner, self.windows.ids, caches, len(self.windows.frame.before), step)
        self._base = found[0] if found else self._base
        return found

    def base_perplexity(self) -> Any:
        """Of the float cache."""
        if self._base is None:
            self.drift([FormatCache(CacheFormat())])
        assert self._base is not None
        return self._base.perplexity("base_nll")

    def asked(self) -> list[Questions]:
        """A text with facts for each window; none where there is no room for them."""
        length = self.windows.length
        starts = [i * length for i in range(self.windows.count)]
        found = [
            questions(self.tokens.ids[start:], length, self.tokenizer, self.windows.frame, number)
            for number, start in enumerate(starts)
        ]
        return [one for one in found if one is not None]

    def repeated(self) -> tuple[int, int] | None:
        """Tokens of a sequence that comes again, and how many there are to draw from."""
        size = getattr(text_config(self.runner.model.config), "vocab_size", None)
        length = min(_REPEATED, (self.windows.length - self.windows.frame.size) // 2)
        return (length, size) if isinstance(size, int) and size > 8 else None

    def sensitivity(self, candidates: Sequence[str]) -> Sensitivity:
        """What each side of each layer would cost."""
        self.say("measuring keys and values of each layer")
        return measure_sensitivity(self.runner, self._spare(), candidates, self.move)

    def recommend(self, sensitivity: Sensitivity, limit: float) -> Recommended:
        """The fewest bits within the limit, verified."""
        known: dict[str, tuple[Drift, tuple[Depth, ...], Repetition | None]] = {}
        self._sizes = dict(sensitivity.heads), dict(sensitivity.widths)

        def measured(fmt: CacheFormat) -> tuple[float, bool]:
            cache = [FormatCache(fmt)]
            self.say("verifying a choice of formats")
            (drift,) = self.drift(cache)
            if drift.kl.value > limit:
                return drift.kl.value, False
            (facts,) = retrieval(self.runner, self.asked(), cache)
            known[str(fmt)] = drift, facts, None
            lost = sum(d.base_found - d.found for d in facts)
            return drift.kl.value, lost <= max(
                1, 0.1 * sum(d.base_found for d in facts)
            )  # a single one comes and goes by chance

        trials = list(search(sensitivity, self.windows.length, limit, measured))
        chosen = best(trials)
        if chosen is None or chosen.format.exact:
            return Recommended(str(CacheFormat()), limit, len(trials), None)
        drift, facts, again = known[str(chosen.format)]
        if (repeated := self.repeated()) is not None:
            (again,) = repetition(self.runner, *repeated, 2, [FormatCache(chosen.format)], self.windows.frame)
        figures = self._figures(RECOMMENDED, chosen.format, drift, facts, again)
        return Recommended(str(chosen.format), limit, len(trials), figures)

    def _figures(
        self, name: str, fmt: CacheFormat, drift: Drift, facts: tuple[Depth, ...], again: Repetition | None
    ) -> CacheFigures:
        context = self.windows.length
        heads, widths = self._shapes()
        sizes = cache_bytes(fmt, context, heads, widths)
        bits = {which: 8 * nbytes / max(1, numbers) for which, (nbytes, numbers) in sizes.items()}
        total, numbers = (sum(pair[i] for pair in sizes.values()) for i in (0, 1))
        top1 = drift.mean("top1")
        return CacheFigures(
            name, str(fmt), 8 * total / max(1, numbers), bits["k"], bits["v"], total / context, drift.perplexity(), drift.kl, top1,
            drift.deciles(), facts, again,
        )  # fmt: skip

    def _shapes(self) -> tuple[dict[int, int], dict[Any, int]]:
        """kv heads by layer, and channels of a head by layer and side."""
        if self._sizes is None:
            self._sizes = self.runner.shapes(self.windows.ids[0][:8])
        return self._sizes

    def _spare(self, count: int = _FEW) -> Tensor:
        """`count` short windows for what is chosen, of text that the others leave where there is some."""
        length = min(_SHORT, self.windows.length)
        after = self.tokens.ids[self.windows.count * self.windows.length :]
        ids = after if len(after) >= count * length else self.tokens.ids
        found = self.windows.frame.windows(ids, length)[:count]
        return torch.stack(found)

    def _steps(self, total: int) -> Callable[[], None]:
        done = iter(range(1, total + 1))
        return lambda: self.move(next(done, total), total)
