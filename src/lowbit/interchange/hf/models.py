"""Models as transformers builds them: without memory for their weights, or from tensors read one at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit.errors import SourceError
from lowbit.interchange.hf.bounds import no_more_than
from lowbit.interchange.hf.calls import asking, one_line
from lowbit.interchange.hf.torch_pool import settle_torch_pool
from lowbit.interchange.tensors import TensorSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The transformers class named by `config.architectures`, else the best automatic one. Never remote code."""
    import transformers

    for architecture in config.architectures or ():
        found = getattr(transformers, str(architecture), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for auto in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModel,
    ):
        if type(config) in auto._model_mapping:
            known: Any = auto._model_mapping[type(config)]
            return known[0] if isinstance(known, (tuple, list)) else known
    raise SourceError(
        f"transformers {transformers.__version__} has no model for the architecture {config.architectures} of type "
        f"{config.model_type!r}, and lowbit runs no code from a model folder; a newer transformers may know it"
    )


def meta_model(config: PretrainedConfig, tensors: int | None = None) -> PreTrainedModel:
    """The model of `config` with all tensors on the meta device, its weights tied. SourceError when it fails.

    tensors: how many the weights have, where they are at hand: building ends where the model needs many times as many.
    """
    cls = model_class(config)
    config = copy.deepcopy(config)  # building may write to it
    try:
        with ExitStack() as stack:
            for context in cls.get_init_context(torch.get_default_dtype(), False, False, None):
                stack.enter_context(context)
            stack.enter_context(no_more_than(tensors))
            model = cls(config)
        model.tie_weights()
    except Exception as error:  # whatever a constructor does with a wrong config
        raise SourceError(
            f"{config.name_or_path or 'the config'}: cannot build {cls.__name__} from it ({one_line(error)}); "
            "check the sizes in config.json"
        ) from error
    return model.eval()


def compute_unsaved(model: PreTrainedModel, saved: Container[str]) -> None:
    """Give what no checkpoint holds the values that the model's own initialization computes: buffers of a meta model such as rotary
    frequencies, and parameters that are the same in every model, such as tables of sines. `saved`: names that have values elsewhere."""
    from transformers import PreTrainedModel

    owners: dict[str, PreTrainedModel] = {}
    for path, module in model.named_modules():
        owners[path] = module if isinstance(module, PreTrainedModel) else owners[path.rpartition(".")[0]]
        computed = [(places, leaf) for places, leaf in _unsaved(module, path, saved) if places[leaf].is_meta]
        for places, leaf in computed:
            empty = torch.empty_like(places[leaf], device="cpu")
            places[leaf] = nn.Parameter(empty, False) if places is module._parameters else empty
        if computed:
            owners[path]._init_weights(module)


def _unsaved(module: nn.Module, path: str, saved: Container[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """(where, under which name) of tensors of a module that the weights have none of and that its class computes. PyTorch's own classes
    have parameters of random values only."""
    computes = not type(module).__module__.startswith("torch.")
    for places in (module._buffers, module._parameters):
        for leaf, tensor in places.items():
            name = f"{path}.{leaf}" if path else leaf
            hidden = leaf in module._non_persistent_buffers_set
            if tensor is not None and (hidden or (computes and name not in saved)):
                yield places, leaf


def float_model(
    config: PretrainedConfig, specs: Mapping[str, TensorSpec], read: Callable[[str], torch.Tensor], dtype: torch.dtype, where: str
) -> nn.Module:  # fmt: skip
    """The model of `config` with the tensors `specs`, each read once by its name and cast to `dtype`. SourceError when it fails."""
    settle_torch_pool()
    weights = {name: _Unread(name, spec, read) for name, spec in specs.items()}
    build: Any = model_class(config)
    with asking("transformers", where, f"load {build.__name__} from it", "check the fields of its config"):
        model: nn.Module = build.from_pretrained(None, config=copy.deepcopy(config), state_dict=weights, dtype=dtype)
    return model


class _Unread:
    """A tensor that transformers' loader reads by `[...]` when its turn comes."""

    def __init__(self, name: str, spec: TensorSpec, read: Callable[[str], torch.Tensor]) -> None:
        self._name, self._read = name, read
        self.shape, self.dtype = spec.shape, spec.dtype

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._read(self._name)
