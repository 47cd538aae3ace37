"""Arch: the facts of a family applied to one model, by the names of its tensors.

Every tensor of the model must have a place in the facts. A model with a norm, a projection or an embedding that
they do not mention is refused by name, because a transform that misses one reader of a channel changes the function.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowbit.errors import TransformError
from lowbit.families import families, family_of
from lowbit.families.family import Family, Graph
from lowbit.interchange.source import Source
from lowbit.transforms.layouts import LAYOUTS, is_values

WITHOUT_FACTS = (
    "round-to-nearest, search, hqq, k-means, gptq and every other method that changes one weight at a time work on it"
)


@dataclass(frozen=True)
class Norm:
    """A norm and the weights that read its output. `bias` None: it has none. `plus_one`: multiplies by 1 + weight."""

    weight: str
    bias: str | None
    readers: tuple[str, ...]
    kind: Literal["rms", "layer"]
    plus_one: bool

    @property
    def consumers(self) -> tuple[str, ...]:
        return self.readers

    @property
    def producers(self) -> tuple[str, ...]:
        """The tensors that change when its channels are scaled."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Link:
    """A linear whose rows make the channels of another: `rows()[c]` makes channel c of the consumer's input."""

    producer: str
    bias: str | None
    consumer: str
    layout: str
    sizes: tuple[int, int, int]  # rows of the producer, channels of the consumer, query heads

    @property
    def consumers(self) -> tuple[str, ...]:
        return (self.consumer,)

    @property
    def producers(self) -> tuple[str, ...]:
        """The tensors that change when its channels are scaled."""
        return (self.producer,) if self.bias is None else (self.producer, self.bias)

    @property
    def is_values(self) -> bool:
        """Whether it is the pair of value and output projections of an attention."""
        return is_values(self.layout)

    @property
    def head_dim(self) -> int:
        return self.sizes[1] // self.sizes[2]

    def rows(self) -> Tensor:
        """int64 [channels of the consumer]: the row of the producer behind each channel; repeated under grouped queries."""
        return LAYOUTS[self.layout](*self.sizes)


Point = Norm | Link


@dataclass(frozen=True)
class Arch:
    """One model: where its channels can be scaled, and what reads and writes its residual stream.

    width       channels of the residual stream
    norms       all norms before linears, the last one before the head too
    links       producer -> consumer pairs
    writers     linears and embeddings that add to the stream; embeddings [count, width] by their last dimension
    post_norms  norms between a writer and the stream
    seconds     the last linear of each MLP -> the channels of its input
    transposed  the weights stored as [in, out]
    biases      weight -> its bias, for those that have one
    tied        alias -> the tensor that it shares, such as a head tied to the embedding
    """

    family: str
    width: int
    norms: tuple[Norm, ...]
    links: tuple[Link, ...]
    writers: tuple[str, ...]
    embeddings: frozenset[str]
    post_norms: tuple[str, ...]
    seconds: Mapping[str, int]
    transposed: frozenset[str]
    biases: Mapping[str, str]
    tied: Mapping[str, str]

    @property
    def points(self) -> tuple[Point, ...]:
        """Every place where channels can be scaled."""
        return (*self.norms, *self.links)

    def point_for(self, consumers: Iterable[str]) -> Point | None:
        """What can take the inverse of a scale of the input that these weights share; None where nothing can.

        A norm counts only if every reader of its output is among `consumers`: one that is left out would see channels
        divided that nobody multiplied.
        """
        wanted = set(consumers)
        for point in self.points:
            if wanted <= set(point.consumers):
                return point if set(point.consumers) <= wanted else None
        return None


def arch_of(source: Source) -> Arch:
    """The facts for this model. TransformError with the reason when there are none or they do not fit."""
    known = getattr(source, "arch", None)
    if isinstance(known, Arch):
        return known
    model_type = getattr(source.config, "model_type", None)
    family = family_of(model_type)
    graph = family.channels if family else None
    if source.config is None or family is None or graph is None:
        what = f"models of type {model_type!r}" if source.config is not None else "a module without a config"
        known = [name for name, f in families().items() if f.channels]
        raise TransformError(
            f"{source.label}: lowbit has no facts about {what}, so it cannot tell which norms and projections belong "
            f"together (it knows {', '.join(known)}); {WITHOUT_FACTS}"
        )
    reason = graph.refuses(source.config)
    if reason is not None:
        raise TransformError(f"{source.label}: {reason}; {WITHOUT_FACTS}")
    return _Resolver(source, family, graph).arch()


class _Resolver:
    """Holds the templates of a family against the names of one model."""

    def __init__(self, source: Source, family: Family, graph: Graph) -> None:
        self.source, self.family, self.graph = source, family, graph
        self.tied = dict(source.inventory.tied)
        self.known = [*(n for n in source.tensors if n not in set(source.extra)), *self.tied]
        self.used: set[str] = set()

    def arch(self) -> Arch:
        graph = self.graph
        norms = tuple(n for template, readers in graph.norms.items() for n in self._norms(template, readers))
        writers = tuple(w for template in graph.writers for w in self._find(template))
        post_norms = tuple(n for template in graph.post_norms for n in self._find(template))
        for template in graph.inside:
            self._find(template, required=False)
        weights = [n for n in self.known if n.endswith(".weight")]
        biases = {w: b for w in weights if (b := w.removesuffix("weight") + "bias") in self.source.tensors}
        self.used |= {b for w, b in biases.items() if w in self.used}
        links = self._links(biases)
        params = self.source.inventory.params
        # An alias of a tensor that has its place, such as the encoder's embedding in T5, needs none of its own.
        unknown = [n for n in self.known if n not in self.used and self.tied.get(n) not in self.used]
        unknown = [n for n in unknown if n not in params or params[n].keep != "buffer"]
        if unknown:
            raise self._misfit(f"{unknown[0]!r} ({len(unknown)} such tensors) has no place in them")
        return Arch(
            self.family.model_type,
            int(self.source.config.hidden_size),  # type: ignore[union-attr]
            norms,
            links,
            writers,
            frozenset(w for w in writers if w in params and params[w].kind == "embedding"),
            post_norms,
            self._seconds(),
            frozenset(n for n, p in params.items() if p.transposed),
            biases,
            self.tied,
        )

    def _norms(self, template: str, readers: tuple[str, ...]) -> Iterable[Norm]:
        for name in self._find(template):
            number = _number(template, name)
            reading = tuple(w for reader in readers for w in self._find(reader, number))
            bias = name.removesuffix("weight") + "bias"
            found = bias if bias in self.source.tensors else None
            yield Norm(name, found, reading, self.family.norm, self.family.plus_one)

    def _links(self, biases: Mapping[str, str]) -> tuple[Link, ...]:
        links = []
        for fact in self.graph.between:
            if fact.relu is not None and getattr(self.source.config, fact.relu, None) != "relu":
                continue
            for producer in self._find(fact.producer, required=False):
                (consumer,) = self._find(fact.consumer, _number(fact.producer, producer))
                sizes = (self._side(producer, out=True), self._side(consumer, out=False), self._heads())
                link = Link(producer, biases.get(producer), consumer, fact.layout, sizes)
                try:
                    link.rows()
                except TransformError as error:
                    raise self._misfit(f"{producer!r} and {consumer!r}: {error}") from None
                links.append(link)
        return tuple(links)

    def _seconds(self) -> dict[str, int]:
        templates = dict.fromkeys(fact.consumer for fact in self.graph.between if not is_values(fact.layout))
        names = [name for template in templates for name in self._find(template, required=False)]
        return {name: self._side(name, out=False) for name in names}

    def _find(self, template: str, number: str | None = None, required: bool = True) -> list[str]:
        """The weights that a template means, for one layer or for all."""
        required = required and not template.endswith("?")
        for choice in template.removesuffix("?").split("|"):
            pattern = _pattern(choice, number or r"\d+")
            found = [name for name in self.known if re.fullmatch(pattern, name)]
            if found:
                self.used |= set(found)
                return found
        if required:
            raise self._misfit(f"there is no {template.replace('{i}', number or 'N')!r}")
        return []

    def _side(self, name: str, out: bool) -> int:
        shape = self.source.tensors[name].shape
        transposed = self.source.inventory.params[name].transposed
        return shape[-2] if out != transposed else shape[-1]

    def _heads(self) -> int:
        return int(self.source.config.num_attention_heads)  # type: ignore[union-attr]

    def _misfit(self, what: str) -> TransformError:
        return TransformError(
            f"{self.source.label}: the facts about models of type {self.family.model_type!r} do not fit: {what}; {WITHOUT_FACTS}"
        )


def _number(template: str, name: str) -> str | None:
    """The number that stands for {i} in a name, None for a template without one."""
    if "{i}" not in template:
        return None
    found = re.fullmatch(_pattern(template, r"(\d+)"), name)
    return found.group(1) if found else None


def _pattern(template: str, number: str) -> str:
    """The names that a template means; stacks of experts are parameters themselves, without `.weight`."""
    return re.escape(template).replace(r"\{i\}", number).replace(r"\*", r"[^.]*") + r"(?:\.weight)?"


def channels(weight: Tensor, arch: Arch, name: str) -> Tensor:
    """A weight as [..., out, in], whichever way it is stored; a view."""
    return weight.mT if name in arch.transposed else weight


def shared_channels(point: Point) -> Tensor | None:
    """int64 [K]: channels with the same number must have the same scale; None where each is free."""
    if isinstance(point, Norm):
        return None
    rows = point.rows()
    return None if len(torch.unique(rows)) == len(rows) else rows
