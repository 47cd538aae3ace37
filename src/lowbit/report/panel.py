"""A card as a panel on the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowbit.measure.advice import Advice
from lowbit.measure.card import Card, TextMark
from lowbit.measure.quality import Estimate
from lowbit.measure.scoring import MEANING
from lowbit.measure.tasks.task import kind_named
from lowbit.measure.verdict import THRESHOLDS, also, slower, verdict_of
from lowbit.planning.cache_words import CacheFacts
from lowbit.report.boxed import Boxed
from lowbit.report.layout import named_lines
from lowbit.report.wording import bits_text, bytes_text, count_text

if TYPE_CHECKING:
    from rich.console import RenderableType

VERDICT_COLOURS = {"indistinguishable": "green", "very close": "green", "noticeable": "yellow", "damaged": "red"}
ABSENT = "-"
_CLOSE = THRESHOLDS[1]
ERROR_LEGEND = "one standard error, from how windows of the text differ, or blocks of 64 tokens in few windows"
KL_LEGEND = f"0 is the float model itself, up to {_CLOSE.kl:g} is {_CLOSE.word}: {_CLOSE.meaning}"
_SPEEDS = (
    ("decode", "decode", "one sequence"),
    ("prefill", "prefill", "reading the prompt"),
    ("batch", "batch", "sequences at once"),
)


def estimate_text(estimate: Estimate | None, unit: str = "", *, scale: float = 1.0) -> str:
    """'0.0021 ± 0.0001 nats/token': as many decimals as two digits of the error, or four digits."""
    if estimate is None:
        return ABSENT
    value, error = estimate.value * scale, estimate.stderr
    decimals = max(0, 3 - _exponent(value))
    if error:
        decimals = max(0, 1 - _exponent(error * scale))
        return f"{value:.{decimals}f} ± {error * scale:.{decimals}f}{unit}"
    return f"{value:.{min(decimals, 6)}f}{unit}"


def _exponent(value: float) -> int:
    """The power of ten of the first digit; 0 for what has none."""
    return int(f"{value:e}".partition("e")[2] or 0) if value else 0


def card_lines(card: Card) -> list[tuple[str, str]]:
    """(name, value) of everything on the card that was measured, in reading order."""
    parts, lines = card.parts, []
    if parts.coverage is not None:
        count = f"{count_text(parts.coverage.quantized)} of {count_text(parts.coverage.total)} parameters"
        lines.append(("quantized", f"{100 * parts.coverage.share:.2f} %  ({count})"))
        if parts.coverage.kept:
            lines.append(("  kept", ", ".join(parts.coverage.kept)))
    lines += _size_lines(card) + _quality_lines(card) + _speed_lines(card)
    lines += cache_lines(parts.cache)
    if parts.quantize_seconds is not None:
        lines.append(("quantizing took", f"{parts.quantize_seconds:.1f} s"))
    peaks = (("quantizing", parts.quantize_peak), ("running", card.run_peak))
    known = [f"{bytes_text(value)} {name}" for name, value in peaks if value is not None]
    if known:
        lines.append(("peak memory", ", ".join(known)))
    if card.text is not None:
        lines.append(("measured on", f"{card.text.name}, {_windows(card.text)} (sha256 {card.text.sha256[:8]})"))
        lines += [("  note", note) for note in card.text.notes]
    lines += [("note", note) for note in parts.notes]
    return lines


def cache_lines(cache: CacheFacts | None) -> list[tuple[str, str]]:
    """How the KV cache is stored, in two lines; none where nothing says so."""
    if cache is None:
        return []
    cost = "`lowbit check-kv` measures it over long contexts"
    return [
        ("KV cache", cache.format),
        ("  takes", cache_bytes(cache)),
        ("  its cost", cost),
    ]


def cache_bytes(cache: CacheFacts) -> str:
    """Bytes of a token, and of all of them at the model's longest context, beside those in 16 bits."""
    whole = f"{bytes_text(cache.bytes)} at {cache.context:,} tokens; in 16 bits it would be {bytes_text(cache.exact)}"
    return f"{bytes_text(cache.per_token)} a token, {whole}"


def _windows(text: TextMark) -> str:
    return f"{text.windows} window{'' if text.windows == 1 else 's'} of {text.length} tokens"


def _size_lines(card: Card) -> list[tuple[str, str]]:
    parts, lines = card.parts, []
    if parts.bytes_after is not None:
        text = bytes_text(parts.bytes_after)
        if parts.bytes_before:
            times = parts.bytes_before / parts.bytes_after
            text = f"{bytes_text(parts.bytes_before)} → {text}  ({times:.1f} times smaller)"
        lines.append(("size on disk", text))
    if parts.bits is not None:
        lines.append(("bits per weight", bits_text(parts.linear_bits, parts.bits, parts.embed_bits)))
    return lines


def _quality_lines(card: Card) -> list[tuple[str, str]]:
    quality = card.quality
    if quality is None:
        return _output_lines(card)
    lines = []
    if quality.base_perplexity is not None:
        before = estimate_text(Estimate(quality.base_perplexity.value))
        after = estimate_text(Estimate(quality.perplexity.value))
        lines.append(("perplexity", f"{before} → {after}  (ratio {estimate_text(quality.ratio)})"))
    else:
        lines.append(("perplexity", estimate_text(quality.perplexity)))
    if quality.kl_mean is not None:
        lines.append(("KL from the float model", estimate_text(quality.kl_mean, " nats/token")))
        lines.append(("  how to read it", KL_LEGEND))
        lines.append(("  worst 1 % of tokens", f"above {estimate_text(quality.kl_p99, ' nats')}"))
        lines.append(("same first choice", estimate_text(quality.top1, " % of tokens", scale=100)))
        if quality.kl_mean.stderr:
            lines.append(("  the ± is", ERROR_LEGEND))
    if quality.program is not None:
        lines.append(("  computed by", quality.program))
    if quality.kind != "causal":
        lines.append(("  scored as", f"{quality.kind} ({MEANING[quality.kind]})"))
    return lines


def _output_lines(card: Card) -> list[tuple[str, str]]:
    """Of a model that predicts no tokens."""
    if card.unmeasured is not None:
        return [("quality", f"not measured: {card.unmeasured}")]
    found = card.outputs
    if found is None:
        return []
    lines = []
    for figure in found.figures:
        kind = kind_named(figure.name)
        if kind is not None:
            lines.append((kind.title, estimate_text(figure.estimate, kind.unit, scale=kind.scale)))
    if found.how:
        lines.append(("  how it was done", found.how))
    lines.append(("outputs moved by", f"{estimate_text(found.error, ' %', scale=100)}  ({found.name})"))
    near = also(found)
    if near is not None:
        lines.append(("  could also be", f"{near.word}, within two standard errors; more inputs would tell"))
    if any(figure.estimate.stderr for figure in found.figures):
        lines.append(("  the ± is", "one standard error, from how the inputs differ"))
    if card.text is None or found.inputs != _windows(card.text):
        lines.append(("compared on", found.inputs))
    return lines


def _speed_lines(card: Card) -> list[tuple[str, str]]:
    speed = card.speed
    if speed is None:
        return []
    if speed.skipped is not None:
        return [("speed", f"not measured: {speed.skipped}")]
    lines = []
    for name, title, meaning in _SPEEDS:
        rate, ratio = getattr(speed.model, name, None), speed.ratio(name)
        if rate is None:
            continue
        if name == "batch" and speed.settings is not None:
            meaning = f"{speed.settings.batch} {meaning}"
        baseline = "" if ratio is None else f", {ratio:.2f} x the float model"
        lines.append((title, f"{rate_text(rate)} tokens/s{baseline}  ({meaning})"))
    if speed.program is not None:
        baseline = "" if speed.base_program is None else f"; the float model by {speed.base_program}"
        lines.append(("  run by", speed.program + baseline))
    late = slower(speed)
    if late is not None:
        lines.append(("  slower", late))
    if speed.alone is not None:
        lines.append(("  not beside it", speed.alone))
    if speed.not_engine is not None:
        lines.append(("  not the engine", speed.not_engine))
    return lines


def rate_text(rate: float) -> str:
    return f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"


def render_card(card: Card, help: Sequence[Advice] = ()) -> RenderableType:
    """The card as a panel: a verdict in plain words, the figures, and both models' answers. `help` stands below it."""
    from rich.console import Group
    from rich.text import Text

    before, after = list[Text](), list[Text]()
    found = verdict_of(card)
    colour = VERDICT_COLOURS[found.word] if found else "blue"
    if found is not None:
        before.append(Text.assemble((found.word, f"bold {colour}"), f": {found.meaning}\n"))
    lines = [("recipe", card.parts.recipe), *card_lines(card)]
    if card.environment is not None:
        lines.append(("  on", f"{card.environment.machine}, torch {card.environment.torch}"))
    figures = [(name, Text(value, style="dim" if name.startswith("  ") else "")) for name, value in lines]
    if card.sample is not None:
        answers = [
            ("\nprompt  ", card.sample.prompt),
            ("float   ", card.sample.base_answer),
            ("lowbit  ", card.sample.answer),
        ]
        after += [Text.assemble((who, "cyan"), said, overflow="fold") for who, said in answers if said is not None]
    title = Text(card.parts.model, style="bold")
    panel = Boxed(named_lines(figures), title, before=before, after=after, colour=colour)
    return Group(panel, *_help(help)) if help else panel


def _help(help: Sequence[Advice]) -> list[RenderableType]:
    """Below the panel, so that its frame does not get into commands that are copied."""
    from rich.padding import Padding
    from rich.text import Text

    lines: list[RenderableType] = [Text("What would help:")]
    for each in help:
        lines.append(Padding(Text(each.why), (0, 0, 0, 2), expand=False))
        lines.append(Text("\n".join(command_lines(each.command)), style="cyan", no_wrap=True, overflow="ignore"))
    return lines


def command_lines(words: Sequence[str], width: int = 78) -> list[str]:
    """A command to copy, indented; over several lines with a backslash where it is longer than `width`."""
    lines, at = [], "   "
    for word in map(shlex.quote, words):
        if len(at) + len(word) + 3 > width and at.strip():
            lines.append(f"{at} \\")
            at = "     "
        at += f" {word}"
    return [*lines, at]
