"""What a format is expected to cost before anything is measured on the model at hand: this project's own measurements, by format.

All figures are mean KL divergences from the float model in nats per token, of SmolLM2-135M-Instruct with its channels
shuffled, embeddings in 8 bits, on windows of 1024 tokens of WikiText-2; SOURCE of each is its file in
`benchmarks/results/`, and a test compares them. They are coarse: a model of 135 million parameters loses more than larger
ones do, so they put recipes in order and say nothing of another model's loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from lowbit.formats import parse_format
from lowbit.interchange.tensors import MULTIPLIED
from lowbit.planning.plan import Plan

CALIBRATION = "32 windows of 1024 tokens of WikiText-2"
CAVEAT = (
    "Expected losses are not measured on this model. They are of the same formats on SmolLM2-135M (channels shuffled), "
    "and larger models lose less: measured on WikiText-2, and where text says yes calibrated with 32 windows of another "
    "part of WikiText-2. Other text, such as that which comes with lowbit (--calibration builtin), may lose more. --json names "
    "the file of results of each."
)


@dataclass(frozen=True)
class Measured:
    """One measurement: weights in `format` and inputs in `inputs` (empty: float), by `recipe`, as the file `source` has it.

    kl: nats per token; stderr: one standard error of it. text: whether the method looked at calibration text, 32 windows of
    1024 tokens of WikiText-2. seconds: that quantizing took there on two cores, None where the file does not say.
    """

    format: str
    kl: float
    stderr: float
    recipe: str
    source: str
    text: bool = False
    inputs: str = ""
    seconds: float | None = None


MEASURED: tuple[Measured, ...] = (
    Measured("int8:g32", 0.00145, 0.00004, "llama.cpp Q8_0", "targets.json"),
    Measured("int8:g128", 0.00249, 0.00009, "w8", "targets.json"),
    Measured("int8:channel", 0.00384, 0.00017, "per-channel", "presets.json"),
    Measured("int8:channel", 0.00658, 0.00013, "w8a8", "calibrated.json", inputs="int8:g64"),
    Measured("int8:channel", 0.0320, 0.0002, "absmax@int8:channel", "activations.md", inputs="int8:token"),
    Measured("e4m3:channel", 0.01949, 0.00093, "fp8", "presets.json"),
    Measured("int5:g32", 0.01749, 0.00072, "qronos@int5:g32", "calibrated.json", text=True, seconds=237.4),
    Measured("iq4nl:g32", 0.04852, 0.00226, "nl4", "calibrated.json", text=True, seconds=267.6),
    Measured("iq4nl:g32", 0.20738, 0.00432, "nl4", "targets.json"),
    Measured("int4:g32", 0.06358, 0.0028, "w4", "calibrated.json", text=True, seconds=152.7),
    Measured("int4:g32", 0.26883, 0.00633, "w4", "targets.json"),
    Measured("int4:g128", 0.09482, 0.00402, "qronos@int4:g128", "calibrated.json", text=True, seconds=227.7),
    Measured("int4:g64", 0.42204, 0.01115, "groupwise", "presets.json"),
    Measured("int3:g64", 0.2912, 0.01106, "qronos@int3:g64", "calibrated.json", text=True, seconds=340.3),
    Measured("uint3:g32:s=(uint6:g8):min=(int6:g8)", 1.29518, 0.03666, "w3", "presets.json"),
    Measured("int2:g64", 1.097, 0.044, "qronos@int2:g64", "calibrated-goals.md", text=True),
    Measured("uint2:g16:s=(uint4:g16):min=(int4:g16)", 6.98843, 0.11673, "w2", "presets.json"),
)
# Mixes that were measured as a whole, by all the formats of their linear layers: the same name means others in another model.
MIXES: tuple[Measured, ...] = (
    Measured("iq4nl:g32 q4_k q5_1 q6_k", 0.03752, 0.00169, "q4_k_m", "gguf.json", text=True),
)
# A format without a measurement of its own loses at most what one does that has fewer bits, or as many and fewer scales or
# offsets. The first that was measured, with text or without, counts.
AT_MOST: Mapping[str, tuple[str, ...]] = {
    "q6_k": ("int5:g32", "iq4nl:g32"),
    "q5_k": ("int5:g32", "iq4nl:g32"),
    "q5_1": ("int5:g32", "iq4nl:g32"),
    "int5:g32": ("iq4nl:g32",),
    "q4_k": ("int4:g32",),
    "q4_1": ("int4:g32",),
    "uint4:g32:asym": ("int4:g32",),
    "int4:g64": ("int4:g128",),
    "int4:g128": ("w3",),
    "w3": ("int3:g64",),
    "q3_k": ("int3:g64", "w2"),
    "int3:g32": ("int3:g64", "w2"),
    "int3:g64": ("w2",),
    "w2": ("int2:g64",),
    "q2_k": ("int2:g64", "w2"),
    "int2:g16": ("int2:g64",),
    "int2:g32": ("int2:g64",),
}
_LONG = {"w3": "uint3:g32:s=(uint6:g8):min=(int6:g8)", "w2": "uint2:g16:s=(uint4:g16):min=(int4:g16)"}


@dataclass(frozen=True)
class ExpectedLoss:
    """kl: nats per token; `at_most`: a bound, by the measurement of a format that is no better; `by`: the measurement."""

    kl: float
    by: Measured
    at_most: bool = False


@lru_cache(maxsize=1)
def _rows() -> dict[tuple[str, str, bool], Measured]:
    return {(_key(row.format), row.inputs, row.text): row for row in MEASURED}


@lru_cache(maxsize=1)
def _bounds() -> dict[str, tuple[str, ...]]:
    return {_key(name): tuple(map(_key, others)) for name, others in AT_MOST.items()}


def _key(text: str) -> str:
    return str(parse_format(_LONG.get(text, text)))


def expected_of_format(fmt: str, inputs: str, text: bool) -> ExpectedLoss | None:
    """What weights of this format cost, inputs as `inputs` says; `text`: with calibration text. None where nothing is known."""
    key = _key(fmt)
    for looked in (True, False) if text else (False,):  # text does not make a method worse
        for at_most, name in ((False, key), *((True, other) for other in _bounds().get(key, ()))):
            row = _rows().get((name, inputs, looked))
            if row is not None:
                return ExpectedLoss(row.kl, row, at_most)
    return None


def expected_loss(plan: Plan, text: bool, name: str = "") -> ExpectedLoss | None:
    """What a plan is expected to cost: at most what its worst format would in all layers. None where one is not known.

    text: whether its recipe is given calibration text. name: of a mix, which may have been measured as a whole: that counts
    where its linear layers have the same formats here as there.
    """
    kinds = {
        (str(t.format.plain), str(t.inputs or ""))
        for t in plan.tensors
        if t.kind in MULTIPLIED and t.format is not None
    }
    mix = next((row for row in MIXES if (row.recipe, row.text) == (name, text)), None)
    if mix is not None and kinds == {(_key(part), mix.inputs) for part in mix.format.split()}:
        return ExpectedLoss(mix.kl, mix)
    found = [expected_of_format(fmt, inputs, text) for fmt, inputs in kinds]
    if not found or None in found:
        return None
    worst = max((loss for loss in found if loss is not None), key=lambda loss: loss.kl)
    return ExpectedLoss(worst.kl, worst.by, worst.at_most or len(kinds) > 1)


# Seconds of quantizing SmolLM2's 134.5 million parameters on two cores: `w4` without text (everyday.json), and with 32 windows of
# 1024 tokens of it (calibrated.json); and tokens per second of its float model on a prompt (engine.md).
PARAMETERS, SECONDS, SECONDS_WITH_TEXT, TOKENS_PER_SECOND = 134_515_008, 17.25, 152.7, 751


def quantizing_seconds(parameters: int, text: bool, samples: int = 32, by: ExpectedLoss | None = None) -> float:
    """About how long quantizing so many parameters takes on two cores, in proportion to what was measured.

    by: what the recipe is expected to lose; with text, where the time of its measurement is known, that one counts.
    """
    if not text:
        return parameters / PARAMETERS * SECONDS
    taken = seconds_of(by)
    return parameters / PARAMETERS * (SECONDS + ((taken or SECONDS_WITH_TEXT) - SECONDS) * samples / 32)


def seconds_of(loss: ExpectedLoss | None) -> float | None:
    """Seconds that the very recipe took on PARAMETERS parameters with text; None where another stands in for it."""
    return None if loss is None or loss.at_most else loss.by.seconds


def measuring_seconds(parameters: int, tokens: int) -> float:
    """About how long a model of so many parameters takes to read so many tokens on two cores."""
    return parameters / PARAMETERS * tokens / TOKENS_PER_SECOND
