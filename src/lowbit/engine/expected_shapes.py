"""Whether the tensors of a model have the shapes that its config gives, by their headers: before any is read."""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.engine.shape import Shape, shape_of
from lowbit.families.family import Config, Experts
from lowbit.interchange.checks.tensors import check_shapes


def check_model_shapes(found: Mapping[str, tuple[int, ...]], config: Config, where: str) -> None:
    """SourceError for the first of the tensors `found` whose shape is not the one that the config gives.

    EngineError for a model that the engine does not compute.
    """
    check_shapes(expected(shape_of(config)), found, config, where)


def expected(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the engine reads, those that a model may lack included."""
    s, decoder = shape, shape.decoder
    queries, keys = s.heads * s.head_dim, s.key_heads * s.head_dim
    of_heads = (queries, keys) if decoder.norms_of_all_heads else (s.head_dim, s.head_dim)
    wanted = {"model.embed_tokens.weight": (s.vocabulary, s.width), "model.norm.weight": (s.width,)}
    wanted |= {"lm_head.weight": (s.vocabulary, s.width), "lm_head.bias": (s.vocabulary,)}

    def linear(name: str, rows: int, cols: int) -> None:
        wanted[f"{name}.weight"] = (rows, cols)
        wanted[f"{name}.bias"] = (rows,)

    for i in range(s.layers):
        read: list[tuple[tuple[str, ...], tuple[int, ...]]] = [(decoder.qkv, (queries, keys, keys))]
        linear(decoder.output.format(i=i), s.width, queries)
        if s.mixtures and s.mixtures[i] and decoder.experts:
            wanted |= _experts(s, decoder.experts, i)
        else:
            read.append((decoder.gate_up, (s.hidden, s.hidden)))
            linear(decoder.down.format(i=i), s.width, s.hidden)
        for names, rows in read:
            for name, count in zip(names, rows if len(names) > 1 else (sum(rows),), strict=True):
                linear(name.format(i=i), count, s.width)
        for kind, name in decoder.norms.items():
            width = {"query_norm": of_heads[0], "key_norm": of_heads[1]}.get(kind, s.width)
            wanted[f"{name.format(i=i)}.weight"] = (width,)
    return wanted


def _experts(s: Shape, names: Experts, i: int) -> dict[str, tuple[int, ...]]:
    """Of a layer with experts: stacked, as lowbit writes them, and apart, as they are published."""
    gate, up, down = (name.replace("{i}", str(i)) + ".weight" for name in names.apart)
    wanted: dict[str, tuple[int, ...]] = {
        f"{router.format(i=i)}.weight": (s.experts, s.width) for router in names.router
    }
    wanted[names.gate_up.format(i=i)] = (s.experts, 2 * s.expert_hidden, s.width)
    wanted[names.down.format(i=i)] = (s.experts, s.width, s.expert_hidden)
    for e in range(s.experts):
        wanted |= {name.format(e=e): (s.expert_hidden, s.width) for name in (gate, up)}
        wanted[down.format(e=e)] = (s.width, s.expert_hidden)
    return wanted
