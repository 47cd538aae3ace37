"""A torch module in memory as a source."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.errors import SourceError
from lowbit.interchange.files.safetensors_reader import bytes_of
from lowbit.interchange.hf.configs import write_tokenizer
from lowbit.interchange.inventory import inventory_of
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorSpec


def claims(model: Any) -> bool:
    """Whether `model` is a torch module."""
    return isinstance(model, nn.Module)


def open_model(model: Any, tokenizer: Any = None) -> Source:
    """Open `model` without copying it."""
    return ModuleSource(model, tokenizer=tokenizer)


class ModuleSource(Source):
    """The parameters and saved buffers of a module. Holds the module; copies no weight until asked."""

    def __init__(self, module: nn.Module, tokenizer: Any = None) -> None:
        self.label = type(module).__name__
        self.config = _config_of(module) if hasattr(module, "save_pretrained") else None
        self._module, self._tokenizer = module, tokenizer
        self.inventory = inventory_of(module)
        state = module.state_dict(keep_vars=True)
        self._state = {name: state[name] for name in self.inventory.params}
        for name, tensor in self._state.items():
            if tensor.is_meta:
                raise SourceError(
                    f"{self.label}: tensor {name!r} is on the meta device and has no values; load it first"
                )
        self.tensors = {n: TensorSpec(n, tuple(t.shape), t.dtype) for n, t in self._state.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, contiguous. Shares memory with the module where it can: do not write to it."""
        self.spec(name)
        return self._state[name].detach().cpu().contiguous()

    def identity(self) -> dict[str, Any]:
        """Class name and a SHA-256 over names, shapes, dtypes and values; reads every tensor once."""
        digest = hashlib.sha256()
        for name, spec in self.tensors.items():
            digest.update(f"{name} {spec.shape} {spec.dtype}\n".encode())
            digest.update(bytes_of(self.read(name)))
        return {"class": self.label, "sha256": digest.hexdigest()}

    def save_assets(self, out: Path) -> None:
        """Tokenizer and generation config, where there are any."""
        if self._tokenizer is not None:
            write_tokenizer(self._tokenizer, out)
        generation = getattr(self._module, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(out)

    def generation(self) -> dict[str, Any]:
        """The module's generation config."""
        found = getattr(self._module, "generation_config", None)
        return {} if found is None else dict(found.to_dict())

    def tokenizer(self) -> Any:
        """The tokenizer given at opening."""
        if self._tokenizer is None:
            raise SourceError(f"{self.label} came without a tokenizer; pass tokenizer=... with the module")
        return self._tokenizer

    def load_float(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> nn.Module:
        """The module itself when it is already so; else a copy of it, cast, moved and in evaluation mode."""
        floats = [t for t in self._state.values() if t.is_floating_point()]
        ready = all(t.dtype == dtype and t.device == torch.device(device) for t in floats)
        if ready and not self._module.training:
            return self._module
        return copy.deepcopy(self._module).to(device=device, dtype=dtype).eval()


def _config_of(module: nn.Module) -> Any:
    """The module's config, a copy with its class where it names none or another, as that of a base model does that was loaded from
    the folder of a model with a head."""
    import transformers

    config: Any = getattr(module, "config", None)
    if config is None:
        return None
    named, own = getattr(config, "architectures", None), type(module).__name__
    if named == [own] or (named and getattr(transformers, own, None) is not type(module)):
        return config
    config = copy.deepcopy(config)
    config.architectures = [own]
    return config
