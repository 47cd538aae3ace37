"""Whether the tensors of a model have the shapes that its config gives, by their headers: before any is read."""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.engine.shape import Shape, shape_of
from lowbit.families.family import Config
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
        for names, rows in ((decoder.qkv, (queries, keys, keys)), (decoder.gate_up, (s.hidden, s.hidden))):
            for name, count in zip(names, rows if len(names) > 1 else (sum(rows),), strict=True):
                linear(name.format(i=i), count, s.width)
        linear(decoder.output.format(i=i), s.width, queries)
        linear(decoder.down.format(i=i), s.width, s.hidden)
        for kind, name in decoder.norms.items():
            width = {"query_norm": of_heads[0], "key_norm": of_heads[1]}.get(kind, s.width)
            wanted[f"{name.format(i=i)}.weight"] = (width,)
    return wanted
