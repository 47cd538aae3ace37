"""The record of a family of models: what its file in this package fills in.

Names of tensors are those of modules in transformers 5, without `.weight`; `{i}` is the number of a layer. A wrong fact
does not pass the tests: they hold the engine's logits against transformers', the float64 logits of a tiny random model
before and after every transform against one another, and a GGUF file against what is read back from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lowbit.families.config_facts import ConfigFacts

Config = Mapping[str, Any]  # the JSON object that transformers writes
Layout = Literal["same", "values", "stacked", "interleaved", "second-half"]
LAYER = "model.layers.{i}."
PRE_NORMS: Mapping[str, str] = {
    "attention_norm": f"{LAYER}input_layernorm",
    "mlp_norm": f"{LAYER}post_attention_layernorm",
}
HEAD_NORMS: Mapping[str, str] = {"query_norm": f"{LAYER}self_attn.q_norm", "key_norm": f"{LAYER}self_attn.k_norm"}


@dataclass(frozen=True)
class Between:
    """Channel c of the consumer's input is made by one row of the producer, with nothing but scaling in between.

    layout   which row: see `lowbit.transforms.layouts`
    relu     the config entry that must say "relu", where an activation function stands in between: of the usual
             ones only ReLU has f(x / s) = f(x) / s for every s > 0
    """

    producer: str
    consumer: str
    layout: Layout = "same"
    relu: str | None = None


@dataclass(frozen=True)
class Graph:
    """Which tensors read and write what, for transforms.

    In a name `*` matches within one part of it, of `a|b` the first that the model (or the layer) has counts, and `a?` may be absent.

    norms       norm -> the linears that read its output, and nothing else does
    between     producer -> consumer pairs through which a scale may pass
    writers     what adds to the residual stream: embeddings (by rows) and linears (by their outputs)
    post_norms  norms between a writer and the residual stream
    inside      tensors that no transform needs to know: norms of queries and keys, attention biases
    refuses     config -> why a model of this type is not what the facts say, or None
    """

    norms: Mapping[str, tuple[str, ...]]
    between: tuple[Between, ...]
    writers: tuple[str, ...]
    post_norms: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    refuses: Callable[[Any], str | None] = lambda config: None


@dataclass(frozen=True)
class Experts:
    """A sparse mixture of MLPs that stands in place of one.

    router         reads what the experts read; of several names the first that there is
    gate_up, down  all experts as one parameter, [experts, out, in]
    apart          gate, up and down of expert `{e}` as checkpoints publish them
    width          the field of the config that says how wide an expert is
    normalized     whether the shares of a token's experts are brought to a sum of 1, or the field that says so
    has            (config, layer) -> whether that layer has experts
    """

    router: tuple[str, ...] = (f"{LAYER}mlp.gate",)
    gate_up: str = f"{LAYER}mlp.experts.gate_up_proj"
    down: str = f"{LAYER}mlp.experts.down_proj"
    apart: tuple[str, str, str] = tuple(f"{LAYER}mlp.experts.{{e}}.{x}_proj" for x in ("gate", "up", "down"))  # type: ignore[assignment]
    width: str = "moe_intermediate_size"
    normalized: bool | str = True
    has: Callable[[Config, int], bool] = lambda config, layer: True


@dataclass(frozen=True)
class Decoder:
    """The parts of a decoder of the Llama kind, for the engine; its graph follows from them.

    qkv, gate_up  the weights that read one input, or the one that holds them stacked
    experts       of the layers that have them in place of one MLP
    norms         our name -> the tensor, of those that a layer has: `PRE_NORMS`, `HEAD_NORMS`, and `attention_post_norm` and
                  `mlp_post_norm` between a part and the residual stream
    norms_of_all_heads  norms of queries and keys weigh all heads as one row, not each by itself
    values        config -> values of `lowbit.engine.shape.Shape` that are not those of Llama
    given         fields whose default is the class's own and not every family's: where one is absent the class is asked
    """

    qkv: tuple[str, ...] = tuple(f"{LAYER}self_attn.{x}_proj" for x in "qkv")
    gate_up: tuple[str, ...] = (f"{LAYER}mlp.gate_proj", f"{LAYER}mlp.up_proj")
    output: str = f"{LAYER}self_attn.o_proj"
    down: str = f"{LAYER}mlp.down_proj"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    experts: Experts | None = None
    norms: Mapping[str, str] = field(default_factory=lambda: PRE_NORMS)
    norms_of_all_heads: bool = False
    values: Callable[[Config], dict[str, Any]] = lambda config: {}
    given: tuple[str, ...] = ()

    @property
    def graph(self) -> Graph:
        """What transforms need to know."""
        experts, gate_up = self.experts, self.gate_up
        writers: tuple[str, ...] = (self.embedding, self.output)
        if (
            experts
        ):  # no scale passes inside of one: every expert would need its own; the router reads the norm as they do
            gate_up = (f"{experts.router[0]}|{gate_up[0]}", f"{experts.gate_up}|{gate_up[-1]}")
            writers = (*writers, experts.down)
        readers = {"attention_norm": self.qkv, "mlp_norm": gate_up}
        from_stream = tuple(name for norm, names in readers.items() if norm not in self.norms for name in names)
        return Graph(
            norms={
                **{self.norms[norm]: names for norm, names in readers.items() if norm in self.norms},
                self.final_norm: (self.head,),
            },
            between=(
                Between(self.qkv[-1], self.output, "values" if len(self.qkv) > 1 else "stacked"),
                Between(self.gate_up[-1], self.down, "same" if len(self.gate_up) > 1 else "second-half"),
            ),
            writers=(*writers, f"{self.down}?" if experts else self.down),
            post_norms=tuple(name for norm, name in self.norms.items() if norm.endswith("post_norm")),
            inside=(*(self.norms[norm] for norm in HEAD_NORMS if norm in self.norms), *from_stream),
        )


@dataclass(frozen=True)
class Gguf:
    """What llama.cpp wants to know. Names of tensors come from the `gguf` package's own map. Facts: llama.cpp's
    `conversion/*.py`, which write what `src/models/*.cpp` read.

    architecture  the name of it there, which several families may have
    model_class   the class of transformers that it is
    metadata      config -> what is written beyond what all decoders have: the name of a `GGUFWriter.add_...` -> its value
    interleaved   the projections of queries and keys, where their rows go in pairs (i, i + d/2) of each head, as llama.cpp
                  rotates them
    tied          the head is always the embedding
    head_size     the width of a head is written, because it need not be hidden size / heads
    windows       layers have the windows that the config says; elsewhere the context ends where a window begins to matter
    scalings      kinds of scaled positions; llama3 needs `rope_freqs.weight`, which is read for few
    fixed         field of the config -> what it may say, of those that llama.cpp has in its code
    refuses       config -> why such a model is not what llama.cpp computes, or None
    biases        what llama.cpp reads a bias of, by the names in the file; None: of everything
    reader        who reads it back: what opens any GGUF file as a source (`whole`), or, where transformers knows no such
                  files, the other direction of the writer alone (`own`)
    """

    architecture: str
    model_class: str
    metadata: Callable[[Any], dict[str, Any]] = lambda config: {}
    interleaved: tuple[str, ...] = ()
    tied: bool = False
    head_size: bool = True
    windows: bool = False
    scalings: tuple[str, ...] = ("default", "linear", "yarn")
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    refuses: Callable[[Any], str | None] = lambda config: None
    biases: tuple[str, ...] | None = ()
    reader: Literal["whole", "own"] = "whole"

    def reads(self, name: str) -> bool:
        """Whether llama.cpp looks for the tensor `name`, where it is a bias; weights are all known."""
        leaf = name.removesuffix(".bias").rpartition(".")[2]
        return not name.endswith(".bias") or self.biases is None or leaf in self.biases


@dataclass(frozen=True)
class Family:
    """What lowbit knows of the models of one `model_type`; of the parts, one that is None is not known.

    config          what becomes of each field of the config
    norm            "rms": x / rms(x) * weight; "layer": LayerNorm, which subtracts the mean and may add a bias
    plus_one        the norm multiplies by 1 + weight
    partial_rotary  `partial_rotary_factor` says how much of a head is rotated; other families rotate all of it whatever it says
    decoder         for the engine, and for transforms where there is no `graph`
    """

    model_type: str
    config: ConfigFacts | None = None
    norm: Literal["rms", "layer"] = "rms"
    plus_one: bool = False
    partial_rotary: bool = False
    decoder: Decoder | None = None
    graph: Graph | None = None
    gguf: Gguf | None = None

    @property
    def channels(self) -> Graph | None:
        """What transforms need to know, where that is known."""
        return self.graph or (self.decoder.graph if self.decoder else None)
