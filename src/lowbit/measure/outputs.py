"""What quantizing cost a model that predicts no tokens: how far its outputs are from the float model's on the same input.

Encoders of text are given windows of text; models of images and sound are given noise of the shape that their config asks for,
drawn from a fixed seed. Noise is no picture: the figure says how far the weights have moved what comes out, not how many answers change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import SourceError
from lowbit.interchange.hf.running import check_vocabulary, device_of, evaluating, max_positions
from lowbit.interchange.hf.text_config import text_config
from lowbit.measure.quality import Estimate
from lowbit.measure.windows import Windows

_SEED = 0
_COUNT = 4  # noisy inputs
_TOKENS = 64  # of an input without a tokenizer
_SAMPLES = 16000  # of sound: a second
_NAMES = ("logits", "last_hidden_state", "image_embeds")  # looked for in this order
_REFUSALS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, NotImplementedError, AssertionError)


@dataclass(frozen=True)
class Outputs:
    """`error`: |a - b| / |b| of the output `name`, b the float model's, a mean over inputs with its standard error.

    `cosine`: of the means over tokens, for encoders of text: what is compared when they are used as embeddings.
    """

    inputs: str
    name: str
    error: Estimate
    cosine: Estimate | None = None


def predicts_tokens(model: nn.Module) -> bool:
    """Whether a model has logits for every token of a text, so that `measure_quality` fits it. Modules of no library do."""
    able = getattr(model, "can_generate", None)
    if not callable(able):
        return True
    names = [cls.__name__ for cls in type(model).__mro__]
    reads = getattr(model, "main_input_name", "input_ids") == "input_ids"
    return reads and (bool(able()) or any("MaskedLM" in name for name in names))


def takes_text(model: nn.Module) -> bool:
    """Whether a model of transformers can be called with token ids."""
    return "input_ids" in inspect.signature(model.forward).parameters


def measure_outputs(model: nn.Module, base: nn.Module, windows: Windows | None) -> Outputs:
    """The outputs of `model` compared with those of `base`. windows: of text, None where there is no tokenizer or
    the model takes no text.

    SourceError where no input is known that the float model takes, TextError where the tokenizer is another model's.
    """
    if windows is not None:
        check_vocabulary(base, windows.ids)
    given, description = _inputs(base, windows)
    errors, cosines, name = list[float](), list[float](), ""
    for one in given:
        name, right = _run(base, one)
        try:
            _, found = _run(model, one)
        except SourceError as error:
            raise SourceError(f"the quantized model fails where the float model does not: {error}") from None
        a, b = found.double().cpu(), right.double().cpu()
        if a.shape != b.shape:
            raise SourceError(
                f"the models give outputs of {tuple(a.shape)} and {tuple(b.shape)}: compare copies of one model"
            )
        errors.append(float((a - b).norm() / b.norm().clamp_min(torch.finfo(torch.float64).tiny)))
        if name == "last_hidden_state" and "input_ids" in one and a.dim() == 3:
            cosines.append(float(torch.cosine_similarity(a.mean(1), b.mean(1)).mean()))
    return Outputs(description, name, _mean(errors), _mean(cosines) if cosines else None)


def _inputs(model: nn.Module, windows: Windows | None) -> tuple[list[dict[str, Tensor]], str]:
    """What the model is called with, and that in words."""
    takes = inspect.signature(model.forward).parameters
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    text = text_config(config)
    makers = {name: make for name, make in _NOISE.items() if name in takes}
    if main not in makers and main != "input_ids":
        raise SourceError(f"no input is known for {type(model).__name__}, which takes {main!r}")
    generator = torch.Generator().manual_seed(_SEED)
    count = _COUNT if windows is None else windows.count
    found = []
    for i in range(count):
        one = {name: make(config, generator) for name, make in makers.items()}
        if "input_ids" in takes:
            one["input_ids"] = _random_ids(model, text, generator) if windows is None else windows.ids[i][None]
        if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
            start = getattr(config, "decoder_start_token_id", None) or 0
            one["decoder_input_ids"] = one.get("input_ids", torch.tensor([[start]]))
        found.append(one)
    noise = " and noise" if makers else ""
    if windows is not None:
        return found, f"{count} window{'' if count == 1 else 's'} of {windows.length} tokens{noise}"
    return found, f"{count} inputs of {'random tokens' + noise if 'input_ids' in takes else 'noise'}"


def _random_ids(model: nn.Module, text: Any, generator: torch.Generator) -> Tensor:
    length = min(_TOKENS, max_positions(model) or _TOKENS)
    return torch.randint(int(text.vocab_size), (1, length), generator=generator)


def _pixels(config: Any, generator: torch.Generator) -> Tensor:
    part = getattr(config, "vision_config", None) or config
    size = getattr(part, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(1, int(getattr(part, "num_channels", None) or 3), int(height), int(width), generator=generator)


def _spectrum(config: Any, generator: torch.Generator) -> Tensor:
    bins = int(getattr(config, "num_mel_bins", None) or 80)
    frames = 2 * int(getattr(config, "max_source_positions", None) or 500)  # Whisper halves them first
    return torch.randn(1, bins, frames, generator=generator)


def _sound(config: Any, generator: torch.Generator) -> Tensor:
    return torch.randn(1, _SAMPLES, generator=generator)


_NOISE: Mapping[str, Callable[[Any, torch.Generator], Tensor]] = {
    "pixel_values": _pixels, "input_features": _spectrum, "input_values": _sound,
}  # fmt: skip


def _run(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """(name, value) of the output that counts. SourceError when the model does not take the inputs."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    device = device_of(model)
    given = {k: x.to(device, own if x.is_floating_point() else x.dtype) for k, x in inputs.items()}
    try:
        with evaluating(model):
            out = model(**given)
    except _REFUSALS as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise SourceError(
            f"{type(model).__name__} does not take {', '.join(inputs)} as made from its config ({reason})"
        ) from None
    if isinstance(out, Tensor):
        return "output", out
    values = {k: x for k, x in out.items() if isinstance(x, Tensor) and x.is_floating_point()}
    name = next((n for n in (*_NAMES, *values) if n in values), None)
    if name is None:
        raise SourceError(f"{type(model).__name__} gives no numbers to compare")
    return name, values[name]


def _mean(values: Sequence[float]) -> Estimate:
    found = torch.tensor(values, dtype=torch.float64)
    spread = float(found.std() / len(values) ** 0.5) if len(values) > 1 else None
    return Estimate(float(found.mean()), spread)
