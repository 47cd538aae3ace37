"""What transformers' own tables say of a GGUF file: which keys its config is made of, and how its tensors become a model's.

There are two kinds of rules. Newer architectures are written as renamings and converters, like any other
checkpoint. Older ones have a `TensorProcessor` that undoes what llama.cpp did to one tensor: the
row order of q and k for its rotary embedding, norms stored as w + 1, experts kept apart, ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from lowbit.errors import SourceError
from lowbit.interchange.hf.calls import one_line
from lowbit.interchange.tensors import TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ReadValues = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class GgufRules:
    """What a conversion needs to plan and read a GGUF file.

    specs       the tensors that the conversion starts from; all float32
    transforms  transformers' renamings and converters for them
    part        (name in `specs`, reader of the file's values) -> that tensor
    files       name in `specs` -> the tensors of the file that it is made of
    unused      names in the file that no parameter needs, such as precomputed rope factors
    """

    specs: Mapping[str, TensorSpec]
    transforms: list[Any]
    part: Callable[[str, ReadValues], torch.Tensor]
    files: Mapping[str, tuple[str, ...]]
    unused: tuple[str, ...] = ()


def config_keys(model_type: str, architecture: str) -> frozenset[str] | None:
    """The keys of the metadata, without the architecture in front, that transformers reads into a config; None where it takes all."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf import is_gguf_arch_supported

    if is_gguf_arch_supported(architecture):  # transformers' newer tables are whole
        return None
    table = GGUF_CONFIG_MAPPING.get(model_type.removesuffix("_text"), GGUF_CONFIG_MAPPING.get(architecture, {}))
    return frozenset(key for key, field in table.items() if field is not None)


def gguf_rules(
    architecture: str, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], where: str
) -> GgufRules:
    """The rules for a file of `architecture` whose tensors have these `shapes`, to become the meta `model`.

    SourceError when transformers has none.
    """
    from transformers.integrations.gguf import get_gguf_conversion_mapping, is_gguf_arch_supported

    try:
        if is_gguf_arch_supported(architecture):
            specs = {name: TensorSpec(name, shape, torch.float32) for name, shape in shapes.items()}
            transforms = get_gguf_conversion_mapping(architecture, model.config)
            return GgufRules(specs, transforms, lambda name, values: values(name), {name: (name,) for name in specs})
        return _processed(architecture, model, shapes)
    except Exception as error:  # transformers' tables, met with an odd file
        raise SourceError(
            f"{where}: transformers cannot turn a GGUF file of the architecture {architecture!r} into a model "
            f"({one_line(error)}); use the model's original safetensors folder"
        ) from error


def _processed(architecture: str, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> GgufRules:
    """Rules by a TensorProcessor; it answers in model names, so nothing is left to rename."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    settings = model.config.to_dict()
    for alias, name in model.config.attribute_map.items():
        settings.setdefault(alias, settings.get(name))
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=settings)
    targets = _targets(architecture, model, processor, shapes)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sources: dict[str, list[str]] = {}  # model name -> names in the file, several for fused experts
    unused = []
    for name in shapes:
        target = targets.get(name, targets.get(name.removesuffix(".weight")))
        if target is not None and target in wanted:
            sources.setdefault(target, []).append(name)
        else:
            unused.append(name)
    specs = {}
    for target, names in sources.items():
        count = sum(prod(shapes[name]) for name in names)  # a wrong count is shown as the file's own shape
        shape = wanted[target] if count == prod(wanted[target]) else shapes[names[0]]
        specs[target] = TensorSpec(target, shape, torch.float32)

    def part(target: str, values: ReadValues) -> torch.Tensor:
        parsed: dict[str, Any] = {"tensors": {}}
        whole = True  # what is read need not be the tensor itself: `rows.py` sends row numbers, one column wide
        for name in sources[target]:
            found = values(name)
            whole = whole and tuple(found.shape) == shapes[name]
            result = processor.process(found.numpy(), name=name, tensor_key_mapping=targets, parsed_parameters=parsed)
            if result.name is not None:  # else the processor has put it into `parsed` itself
                parsed["tensors"][target] = torch.from_numpy(result.weights)
        tensor = parsed["tensors"].get(target)
        if tensor is None or (whole and tuple(tensor.shape) != wanted[target]):
            raise SourceError(f"{' + '.join(sources[target])} of the GGUF file did not become {target!r}")
        return tensor

    files = {target: tuple(names) for target, names in sources.items()}
    return GgufRules(specs, [], part, files, tuple(unused))


class _Level:
    """As much of a module as transformers' name map looks at, with chosen children instead of all."""

    def __init__(self, module: Any, config: Any, children: Iterable[str] = ()) -> None:
        self.config, self.state_dict = config, module.state_dict
        self._children = [(name, _Level(getattr(module, name), config)) for name in children if hasattr(module, name)]

    def named_children(self) -> list[tuple[str, _Level]]:
        return self._children


def _targets(architecture: str, model: PreTrainedModel, processor: Any, names: Iterable[str]) -> dict[str, str]:
    """Name in the file -> name in the model, by transformers' map for the file's architecture (a Mistral is a `llama` there).

    transformers builds its table anew for every module below the model, seconds of work. Names are
    those of the model or of its base model, so these two are asked first, and all only if that fails.
    """
    from gguf import MODEL_ARCH_NAMES
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    kind = architecture if architecture in MODEL_ARCH_NAMES.values() else None
    targets = get_gguf_hf_weights_map(_Level(model, model.config, [model.base_model_prefix]), processor, kind)
    if any(name not in targets and name.removesuffix(".weight") not in targets for name in names):
        targets = get_gguf_hf_weights_map(model, processor, kind)
    return targets
