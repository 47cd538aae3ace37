"""Whether a transform kept the function: float64 logits before and after, on random tokens.

transformers' norms and softmaxes cast to float32 inside; `in_float64` turns these casts into float64, so that what is
compared are the formulas, not their rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowbit.errors import SourceError, TransformError
from lowbit.interchange.hf.calls import one_line
from lowbit.interchange.source import Source
from lowbit.transforms.hadamard import Rotation
from lowbit.transforms.transformed import TransformedSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOLERANCE = 1e-10


def check_function(source: Source, transformed: TransformedSource, *, tokens: int = 24, seed: int = 0) -> float:
    """|logits after - logits before| / |logits before| in float64. TransformError above 1e-10.

    Loads both models, one after the other. The rounding of a source that stores less than float64 counts as an error.
    """
    before = logits(source, tokens=tokens, seed=seed)
    after = logits(transformed, tokens=tokens, seed=seed, online=transformed.online)
    error = float((after - before).norm() / before.norm())
    if not error <= TOLERANCE:
        raise TransformError(
            f"{transformed.transform} changes the function of {source.label}: logits differ by {error:.1e} of their norm "
            f"(allowed: {TOLERANCE:.0e}); the facts about {transformed.arch.family!r} do not hold for this model"
        )
    return error


@torch.no_grad()
def logits(source: Source, *, tokens: int, seed: int, online: dict[str, Rotation] | None = None) -> Tensor:
    """Float64 logits of the model on random tokens, [2, tokens, vocabulary]; `online` rotates inputs while it runs."""
    # Not a module's own load_float: buffers that a config determines, such as Gemma's embedding scale, must be built alike.
    model: Any = Source.load_float(source, torch.float64)
    config = model.config
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product of transformers has no float64
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.get_text_config().vocab_size, (2, tokens), generator=generator)
    inputs = {"input_ids": ids}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    with in_float64(), _rotating(model, online or {}):
        found: Tensor = model(**inputs, use_cache=False).logits
    return found


def check_family(config: PretrainedConfig, transform: Any, **options: Any) -> float:
    """`check_function` of a transform on a tiny random model of this config's kind: for a model not seen in the tests.

    TransformError when the facts do not fit or do not hold; SourceError when no tiny model can be built.
    """
    from lowbit.interchange.hf.models import model_class
    from lowbit.interchange.opening import open_source

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            tiny = tiny_config(config)
            model: Any = model_class(tiny)(tiny).double().eval()
        except Exception as error:  # whatever a constructor does with sizes that it did not expect
            raise SourceError(
                f"no tiny model of type {config.model_type!r} can be built to check transforms on: {one_line(error)}"
            ) from error
        with torch.no_grad():
            for param in model.parameters():  # norms of ones and biases of zeros would hide mistakes
                param.copy_(torch.randn(param.shape, dtype=torch.float64) * 0.1 + 0.05)
    source = open_source(model)
    return check_function(source, transform(source, **options))


def tiny_config(config: PretrainedConfig) -> PretrainedConfig:
    """The same kind of model with two layers, width 32 and four heads of eight; everything else as it is."""
    tiny = copy.deepcopy(config)
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2, "num_decoder_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": None if shared is None else (4 if shared == heads else 1 if shared == 1 else 2),
        "intermediate_size": 64, "n_inner": None, "ffn_dim": 64, "d_ff": 64, "vocab_size": 128,
        "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if hasattr(tiny, "word_embed_proj_dim"):
        tiny.word_embed_proj_dim = 32 if config.word_embed_proj_dim == config.hidden_size else 16
    if getattr(tiny, "layer_types", None):
        tiny.layer_types = list(tiny.layer_types)[:2]
    for key, value in sizes.items():
        if getattr(tiny, key, None) is not None:
            setattr(tiny, key, value)
    return tiny


class _Float64(TorchFunctionMode):
    """Casts to float32 become casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def up(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        return func(*(up(a) for a in args), **{k: up(v) for k, v in (kwargs or {}).items()})


@contextmanager
def in_float64() -> Iterator[None]:
    """Run what is inside with float64 wherever it asks for float32."""
    with _Float64():
        yield


@contextmanager
def _rotating(model: nn.Module, online: dict[str, Rotation]) -> Iterator[None]:
    """Rotate the inputs of these linears while inside."""
    hooks = []
    for name, rotation in online.items():

        def rotate(module: nn.Module, args: tuple[Tensor, ...], by: Rotation = rotation) -> tuple[Tensor, ...]:
            return (by.apply(args[0]), *args[1:])

        hooks.append(model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(rotate))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
