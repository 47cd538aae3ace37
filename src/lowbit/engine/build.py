"""From a shape and weights to the program that the C++ core runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lowbit.engine.kernel_weights import Inputs, KernelWeight, alike, alternated, halved, joined
from lowbit.engine.packing import PackingPool
from lowbit.engine.shape import Shape
from lowbit.engine.weights import Found, Weights, as_float
from lowbit.errors import EngineError
from lowbit.families.family import Experts
from lowbit.formats import IntGrid, QTensor
from lowbit.kernels.layout import Floats, codes_of, pack, residual_of, why_not

if TYPE_CHECKING:
    import lowbit._core as _core


T = TypeVar("T")
Later = Callable[[], T]


@dataclass
class Program:
    """What `lowbit._core.Decoder` takes, and what had to be changed of the weights on the way.

    nbytes: of all packed weights, of which `lookup_bytes` belong to an embedding that is no head, of which a token reads
    one row, and `idle_bytes` to experts that a token does not take. expanded: weights that no kernel holds packed, with the reason; they are float16 here. rounded: those whose
    levels were rounded to fit (see `kernels.layout`).
    """

    model: _core.ModelSpec | None = None
    nbytes: int = 0
    lookup_bytes: int = 0
    idle_bytes: int = 0
    expanded: dict[str, str] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)


class Builder:
    """Builds the program of one model. activations: of weights whose recipe says nothing about them, "exact" or "int8".

    Weights are packed while the next ones are read. So what describes a part of the model is made later, by the function that
    the methods here return, which waits for its weights.
    """

    if TYPE_CHECKING:
        import lowbit._core as core  # so that arguments are checked
    else:
        core: Any

    def __init__(self, core: Any, shape: Shape, weights: Weights, activations: str = "exact") -> None:
        if not TYPE_CHECKING:
            self.core = core
        self.shape, self.weights = shape, weights
        self.bits = {"exact": 15, "int8": 8}[activations]
        self.program = Program()
        self._packed_so_far: list[Future[Any]] = []

    def build(self, threads: int = 1) -> Program:
        """Reads every weight once, and packs beside that in `threads` threads. EngineError for one that the engine cannot use."""
        with PackingPool(threads) as self._packers:
            self.program.model = self._model()()
            self.program.nbytes = self._packers.nbytes
        return self.program

    def _model(self) -> Later[_core.ModelSpec]:
        s = self.shape
        embedding = self._source("model.embed_tokens", whole=True)
        tied = self.weights.find("lm_head.weight") is None or self._same("lm_head", "model.embed_tokens")
        packed = self._pack([embedding.value])
        if tied:
            bias = self.weights.vector("lm_head.bias")
            head = self._projection(s.width, s.vocabulary, [self._part(packed, None, embedding.inputs, 0, bias)])
        else:
            head = self._product(["lm_head"], s.width, [s.vocabulary])
        self.program.lookup_bytes = 0 if tied else packed.result().nbytes
        norm = self._norm("model.norm")
        layers = [self._layer(i) for i in range(s.layers)]
        return lambda: self.core.ModelSpec(
            width=s.width, heads=s.heads, key_heads=s.key_heads, head_dim=s.head_dim, vocabulary=s.vocabulary,
            epsilon=s.epsilon, attention_scale=s.attention_scale, attention_soft_cap=s.attention_soft_cap,
            logit_soft_cap=s.logit_soft_cap, logit_scale=s.logit_scale, embedding_scale=s.embedding_scale,
            residual_scale=s.residual_scale, gate=getattr(self.core.Gate, s.gate), embedding=packed.result(),
            final_norm=norm, head=head(), layers=[layer() for layer in layers],
        )  # fmt: skip

    def _layer(self, i: int) -> Later[_core.LayerSpec]:
        s, decoder = self.shape, self.shape.decoder
        norms = {
            name: self._norm(decoder.norms[name].format(i=i)) if name in decoder.norms else None
            for name in (
                "attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm", "query_norm", "key_norm",
            )
        }  # fmt: skip
        queries, keys = s.heads * s.head_dim, s.key_heads * s.head_dim
        qkv = self._product([n.format(i=i) for n in decoder.qkv], s.width, [queries, keys, keys])
        output = self._product([decoder.output.format(i=i)], queries, [s.width])
        mlp: Later[_core.MlpSpec] | None = None
        experts: Later[_core.ExpertsSpec] | None = None
        if decoder.experts and s.mixtures[i]:
            experts = self._experts(i, decoder.experts)
        else:
            gate_up = self._gate_up([n.format(i=i) for n in decoder.gate_up])
            mlp = self._mlp(gate_up, self._product([decoder.down.format(i=i)], s.hidden, [s.width]))
        return lambda: self.core.LayerSpec(
            **norms, qkv=qkv(), output=output(), mlp=mlp and mlp(), experts=experts and experts(), rope=s.rope[i], window=s.window[i],
        )  # fmt: skip

    def _mlp(self, gate_up: Later[_core.ProjectionSpec], down: Later[_core.ProjectionSpec]) -> Later[_core.MlpSpec]:
        return lambda: self.core.MlpSpec(gate_up=gate_up(), down=down())

    def _experts(self, i: int, names: Experts) -> Later[_core.ExpertsSpec]:
        """A mixture, of stacks of experts or of experts one by one."""
        s, hidden = self.shape, self.shape.expert_hidden
        routers = [name.format(i=i) for name in names.router]
        router = next((n for n in routers if self.weights.find(f"{n}.weight") is not None), routers[0])
        routing = self._product([router], s.width, [s.experts])
        stacks: list[KernelWeight] = []
        for name in (names.gate_up.format(i=i), names.down.format(i=i)):
            found = self.weights.find(name)
            if found is not None:
                stacks.append(self._read(name, found))
        wanted = (hidden, hidden, s.width)
        mlps: list[Later[_core.MlpSpec]] = []
        before = len(self._packed_so_far)
        for e in range(s.experts):
            if stacks:
                both, down = stacks
                at, middle = 2 * hidden * e, 2 * hidden * e + hidden
                three = [
                    both.part(at, middle),
                    both.part(middle, middle + hidden),
                    down.part(s.width * e, s.width * (e + 1)),
                ]
            else:
                three = [self._source(name.format(i=i, e=e)) for name in names.apart]
            if tuple(source.value.rows for source in three) != wanted:
                raise EngineError(f"expert {e} of layer {i} does not have the {wanted} rows that the config says")
            parts = [self._packed(three[2:], 0, None)]
            mlps.append(
                self._mlp(self._pair(three[:2], [None, None], hidden), self._projection(hidden, s.width, parts))
            )
        packed = self._packed_so_far[before:]

        def spec() -> _core.ExpertsSpec:
            nbytes = sum(weight.result().nbytes for weight in packed)
            self.program.idle_bytes += nbytes * (s.experts - s.top_k) // s.experts
            return self.core.ExpertsSpec(
                router=routing(), experts=[mlp() for mlp in mlps], top_k=s.top_k, normalized=s.normalized
            )

        return spec

    def _product(self, names: list[str], cols: int, widths: list[int]) -> Later[_core.ProjectionSpec]:
        """Weights that read one input, one after another; packed as one where they can be."""
        found = [self._source(name) for name in names]
        biases = [self.weights.vector(f"{name}.bias") for name in names]
        rows = [source.value.rows for source in found]
        if sum(rows) != sum(widths):
            raise EngineError(f"{names[0]!r} has {sum(rows)} rows where the config says {sum(widths)}")
        if alike(found, paired=False):
            parts = [self._packed(found, 0, joined(biases, rows))]
        else:
            offsets = [sum(rows[:i]) for i in range(len(rows))]
            parts = [self._packed([s], o, b) for s, o, b in zip(found, offsets, biases, strict=True)]
        return self._projection(cols, sum(widths), parts)

    def _gate_up(self, names: list[str]) -> Later[_core.ProjectionSpec]:
        s = self.shape
        if len(names) == 1:
            source = self._source(names[0])
            found = [source.part(0, s.hidden), source.part(s.hidden, 2 * s.hidden)]
            bias = self.weights.vector(f"{names[0]}.bias")
            biases = [None, None] if bias is None else [bias[: s.hidden], bias[s.hidden :]]
        else:
            found = [self._source(name) for name in names]
            biases = [self.weights.vector(f"{name}.bias") for name in names]
        return self._pair(found, biases, s.hidden)

    def _pair(self, found: list[KernelWeight], biases: list[Tensor | None], hidden: int) -> Later[_core.ProjectionSpec]:
        """Gate and up: as a pair whose products meet in registers, or one after the other."""
        width = self.shape.width
        # A pair meets before anything can be added to it.
        if alike(found, paired=True) and found[0].residual is None:
            return self._projection(width, hidden, [self._packed(found, 0, alternated(biases), paired=True)])
        parts = [self._packed([f], o, b) for f, o, b in zip(found, (0, hidden), biases, strict=True)]
        return self._projection(width, 2 * hidden, parts)

    def _projection(self, cols: int, width: int, parts: list[Later[_core.PartSpec]]) -> Later[_core.ProjectionSpec]:
        return lambda: self.core.ProjectionSpec(cols=cols, width=width, parts=[part() for part in parts])

    def _packed(
        self, sources: list[KernelWeight], offset: int, bias: Tensor | None, paired: bool = False
    ) -> Later[_core.PartSpec]:
        """A part of a projection: weights alike, packed as one, and what is added to them."""
        inputs, residuals = sources[0].inputs, [s.residual for s in sources if s.residual is not None]
        weight = self._pack([s.value for s in sources], inputs, paired)
        residual = self._pack(residuals, inputs) if residuals else None
        return self._part(weight, residual, inputs, offset, bias)

    def _pack(self, sources: list[Any], inputs: Inputs | None = None, paired: bool = False) -> Future[Any]:
        started = self._packers.start(pack, self.core, sources, paired, inputs.segment if inputs else 0)
        self._packed_so_far.append(started)
        return started

    def _part(
        self, weight: Future[Any], residual: Future[Any] | None, inputs: Inputs, offset: int, bias: Tensor | None
    ) -> Later[_core.PartSpec]:
        return lambda: self.core.PartSpec(
            weight=weight.result(), residual=residual and residual.result(), activations=inputs.spec(self.core),
            bias=None if bias is None else bias.numpy(), offset=offset,
        )  # fmt: skip

    def _source(self, name: str, whole: bool = False) -> KernelWeight:
        """The weight of a module. whole: nothing can be added to it, as to one whose rows are looked up."""
        return self._read(name, self.weights.get(f"{name}.weight"), whole)

    def _read(self, name: str, found: Found, whole: bool = False) -> KernelWeight:
        """A weight as the kernels read it, or a stack of such, one after another."""
        if not isinstance(found.value, QTensor):
            return KernelWeight(Floats(as_float(found.value).flatten(0, -2)), Inputs(self.bits))
        inputs, reason = self._input(name, found), why_not(found.value, stack=len(found.value.shape) == 3)
        if reason is None:
            codes = codes_of(found.value)
            if not codes.rounded:
                return KernelWeight(codes, inputs)
            if inputs.bits == 8:
                self.program.rounded.append(name)
                return KernelWeight(codes, inputs)
            # Rounded levels cost as much as int8 activations do, which "exact" is there to avoid.
            residual = None if whole else residual_of(found.value, codes)
            if residual is not None:
                return KernelWeight(codes, inputs, residual)
            reason = f"the levels of {found.value.format.grid} would have to be rounded"
        self.program.expanded[name] = reason
        # Float weights multiply what is not rounded: a divisor of the inputs is one of the columns.
        return KernelWeight(Floats(halved(found.value.dequantize(), inputs.divisor).flatten(0, -2)), Inputs(self.bits))

    def _input(self, name: str, found: Found) -> Inputs:
        quantizer = found.inputs
        if quantizer is None:
            return Inputs(self.bits)
        inputs, fmt = quantizer.inputs, quantizer.inputs.format
        divisor = quantizer.divisor
        if fmt is None:
            return Inputs(self.bits, divisor=divisor)
        symmetric = isinstance(fmt.grid, IntGrid) and fmt.grid.bits == 8 and fmt.grid.signed and fmt.offset is None
        if not symmetric or fmt.scale != "fp32" or inputs.outliers is not None or fmt.block.rows not in (1, -1):
            raise EngineError(f"the inputs of {name!r} are {inputs}; the engine rounds inputs to symmetric int8 only")
        if inputs.static:
            if quantizer.scale is None or quantizer.scale.numel() != 1:
                raise EngineError(
                    f"the inputs of {name!r} are {inputs}; the engine takes only one stored scale for these"
                )
            return Inputs(8, static_scale=float(quantizer.scale), divisor=divisor)
        if fmt.block.rows == -1:
            raise EngineError(
                f"the inputs of {name!r} are {inputs}, one scale for all tokens that is found while running; the engine needs a stored one"
            )
        if fmt.block.cols == -1:
            return Inputs(8, per_token=True, divisor=divisor)
        return Inputs(8, divisor=divisor, segment=fmt.block.cols)

    def _norm(self, name: str) -> Any:
        weight = self.weights.vector(f"{name}.weight")
        if weight is None:
            return None
        return (weight + 1 if self.shape.plus_one else weight).numpy()

    def _same(self, one: str, other: str) -> bool:
        a, b = (self.weights.get(f"{n}.weight").value for n in (one, other))
        if isinstance(a, QTensor) and isinstance(b, QTensor):
            return a.codes.data_ptr() == b.codes.data_ptr() or (
                a.format == b.format
                and a.shape == b.shape
                and all(torch.equal(a.parts()[k], b.parts()[k]) for k in a.parts())
            )
        return isinstance(a, Tensor) and isinstance(b, Tensor) and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))
