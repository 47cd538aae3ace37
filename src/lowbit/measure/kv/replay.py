"""Layers before a change are not run again: they give what they gave to the float model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lowbit.measure.kv.runner import Runner, State


class Replay:
    """What each decoder layer returned for one sequence with the float cache."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._layers = decoder_layers(runner.model)
        self._returned: dict[int, Any] = {}

    def record(self, ids: Tensor) -> State:
        """Run the sequence and keep what each layer returns: [tokens, hidden size] for each."""
        with ExitStack() as stack:
            for number, layer in self._layers.items():

                def keep(_: nn.Module, __: Any, output: Any, number: int = number) -> None:
                    self._returned[number] = output

                stack.callback(layer.register_forward_hook(keep).remove)
            return self.runner.run(ids)

    @contextmanager
    def up_to(self, layer: int) -> Iterator[None]:
        """Within, layers before this number return at once what they returned then."""
        replaced = [(module, number) for number, module in self._layers.items() if number < layer]
        for module, number in replaced:
            output = self._returned[number]
            module.forward = lambda *_, output=output, **__: output  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module, _ in replaced:
                del module.forward


def decoder_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The blocks of a decoder by number: elements of the one list of modules that hold attention. Empty where that is not plain, and
    then every layer is run."""
    found: dict[int, nn.Module] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        number = getattr(module, "layer_idx", None)
        parts = name.split(".")
        ends = [i for i in range(len(parts), 0, -1) if isinstance(modules[".".join(parts[: i - 1])], nn.ModuleList)]
        if isinstance(number, int) and ends:
            block = modules[".".join(parts[: ends[-1]])]
            if found.setdefault(number, block) is not block:
                return {}
    plain = all("forward" not in vars(block) for block in found.values())
    return found if plain and len(set(map(id, found.values()))) == len(found) else {}
