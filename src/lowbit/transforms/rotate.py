"""Rotations that spread outliers over all channels (Ashkboos et al. 2024, QuaRot, section 4; the names are SpinQuant's).

    R1  the residual stream x becomes x Q: writers W -> Q' W, b -> b Q, embeddings E -> E Q, readers W -> W Q
    R2  each head of the values becomes v R: W_v -> R' W_v by heads, W_o -> W_o R by heads
    R4  the input of an MLP's second linear is rotated while the model runs, W -> W H

R1 passes RMSNorm because |x Q| = |x|, once the norm's weight is folded away. LayerNorm also subtracts the mean, so Q
must keep the all-ones direction: then mean(x Q) = mean(x), and (x - mean) Q = x Q - mean. Such a Q leaves LayerNorm
as it is, with its bias b -> b Q, and no class has to change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from lowbit.errors import RecipeError, TransformError
from lowbit.interchange.source import Source
from lowbit.transforms.arch import Arch, Link, arch_of
from lowbit.transforms.fold import fold
from lowbit.transforms.hadamard import Rotation, online_rotation, rotation_for
from lowbit.transforms.registry import transform
from lowbit.transforms.transformed import Edit, TransformedSource

Edits = dict[str, list[Edit]]


@transform("source", undone_by={"fold": "has nothing left to fold, because rotating folds what it needs"})
def rotate(source: Source, *, seed: int = 0, r1: int = 1, r2: int = 1, r4: int = 0) -> TransformedSource:
    """Rotate the activations between layers, and the weights to match, so that outliers are spread over all channels.

    r1 rotates the residual stream, r2 the values of each head, and r4 the inputs of second MLP linears, while the model
    runs. r1 folds the norms first, the last one into the head too, which unties a head that shares the embedding.
    TransformError for an unknown architecture, for r1 where a norm stands between a writer and the stream, and for r4
    where all MLPs are experts. RecipeError when nothing is asked for.
    """
    if not (r1 or r2 or r4):
        raise RecipeError("rotate with r1=0, r2=0 and r4=0 rotates nothing; leave it out")
    arch = arch_of(source)
    edits: Edits = {}
    online: dict[str, Rotation] = {}
    notes: list[str] = []
    inner = source
    if r1:
        _check_stream(source, arch)
        inner = fold(source, head=1)
        arch = inner.arch
        mean = any(norm.kind == "layer" for norm in arch.norms)
        _stream(arch, rotation_for(arch.width, seed, mean=mean), edits)
    if r2:
        for link in arch.links:
            if link.is_values:
                _values(link, rotation_for(link.head_dim, seed + 1), edits)
    if r4:
        if not arch.seconds:
            raise TransformError(f"{source.label}: the inputs of experts are not rotated online; leave r4 out")
        online = _online(arch, seed + 2, edits)
        notes.append(f"the inputs of {len(online)} linears are rotated while the model runs")
    text = f"rotate(seed={seed},r1={int(bool(r1))},r2={int(bool(r2))},r4={int(bool(r4))})"
    return TransformedSource(inner, text, {k: tuple(v) for k, v in edits.items()}, _without(arch, online),
                             online=online, notes=tuple(notes))  # fmt: skip


def _check_stream(source: Source, arch: Arch) -> None:
    if arch.post_norms:
        raise TransformError(
            f"{source.label}: the residual stream of a {arch.family} model cannot be rotated, because the norm "
            f"{arch.post_norms[0]!r} weighs channels between a writer and the stream; use rotate(r1=0) for the rest"
        )


def _stream(arch: Arch, q: Rotation, edits: Edits) -> None:
    """R1. Embeddings and readers turn their last dimension, writers their rows and biases."""
    turn = Edit(q.apply, by_rows=True)
    for norm in arch.norms:
        for reader in norm.readers:
            _add(edits, reader, turn)
        if norm.bias is not None:
            _add(edits, norm.bias, turn)
    for writer in arch.writers:
        if writer in arch.embeddings:
            _add(edits, writer, turn)
        else:
            _add(edits, writer, Edit(lambda w: q.apply(w.mT).mT))
            if writer in arch.biases:
                _add(edits, arch.biases[writer], turn)


def _values(link: Link, r: Rotation, edits: Edits) -> None:
    """R2. Rows of the producer by value heads, and columns of the consumer by query heads."""
    d = link.head_dim
    rows = link.rows().unique(sorted=True)  # each value row once, head by head

    def rotate_rows(w: Tensor) -> Tensor:
        rotated = w.clone()
        heads = w[rows].reshape(-1, d, *w.shape[1:]).movedim(1, -1)
        rotated[rows] = r.apply(heads).movedim(-1, 1).reshape(-1, *w.shape[1:])
        return rotated

    _add(edits, link.producer, Edit(rotate_rows))
    if link.bias is not None:
        _add(edits, link.bias, Edit(rotate_rows))
    _add(edits, link.consumer, Edit(_by_heads(r, d), by_rows=True))


def _by_heads(r: Rotation, d: int) -> Callable[[Tensor], Tensor]:
    return lambda w: r.apply(w.reshape(*w.shape[:-1], -1, d)).reshape(w.shape)


def _online(arch: Arch, seed: int, edits: Edits) -> dict[str, Rotation]:
    """R4, on the second linear of every MLP: W -> W H for an input that will be x H."""
    online = {}
    for name in arch.seconds:
        h = online_rotation(arch.seconds[name], seed)
        _add(edits, name, Edit(h.apply, by_rows=True))
        online[name] = h
    return online


def _without(arch: Arch, online: dict[str, Rotation]) -> Arch:
    """No scale passes from a producer to a consumer through an online rotation."""
    return replace(arch, links=tuple(link for link in arch.links if link.consumer not in online))


def _add(edits: Edits, name: str, edit: Edit) -> None:
    edits.setdefault(name, []).append(edit)
