"""Norm folding: the weight of a norm goes into the linears that read it.

    W (gamma * n + beta) + b  =  (W diag(gamma)) n + (W beta + b)

so the norm keeps weight one and no bias. Where a reader has no bias to take W beta, the norm keeps beta / gamma, which
is the same thing written otherwise. Rotations need it (Ashkboos et al. 2024, QuaRot, section 4.1; SliceGPT, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.errors import TransformError
from lowbit.interchange.source import Source
from lowbit.transforms.arch import Arch, Norm, arch_of, channels
from lowbit.transforms.registry import transform
from lowbit.transforms.transformed import Edit, TransformedSource, exact


@transform("source")
def fold(source: Source, *, head: int = 0) -> TransformedSource:
    """Multiply the weights of norms into the linear layers that read them.

    `head=1` folds the last norm into the head too, which unties a head that shares the embedding: the file then holds
    both. TransformError for an unknown architecture.
    """
    arch = arch_of(source)
    edits: dict[str, list[Edit]] = {}
    untied, notes = [], []
    for norm in arch.norms:
        tied = [reader for reader in norm.readers if reader in arch.tied]
        if tied and not head:
            notes.append(f"{norm.weight} is not folded, because {tied[0]} shares the embedding; fold(head=1) unties it")
            continue
        if tied:
            untied += tied
            notes.append(f"{tied[0]} no longer shares {arch.tied[tied[0]]}: it is stored on its own")
        for name, edit in _folded(source, arch, norm):
            edits.setdefault(name, []).append(edit)
    done = {name: tuple(list_of) for name, list_of in edits.items()}
    text = f"fold(head={int(bool(head))})"
    return TransformedSource(source, text, done, arch, untied=tuple(dict.fromkeys(untied)), notes=tuple(notes))


def gain(norm: Norm, weight: Tensor) -> Tensor:
    """What a norm multiplies by, from its stored weight."""
    return weight + 1 if norm.plus_one else weight


def stored_gain(norm: Norm, value: Tensor) -> Tensor:
    """The stored weight of a norm that multiplies by `value`."""
    return value - 1 if norm.plus_one else value


def _folded(source: Source, arch: Arch, norm: Norm) -> list[tuple[str, Edit]]:
    def gamma() -> Tensor:
        return gain(norm, exact(source, norm.weight))

    # Into the columns, into the biases, and out of the norm.
    edits = [(reader, Edit(lambda w: w * gamma(), by_rows=True)) for reader in norm.readers]
    edits.append((norm.weight, Edit(lambda g: stored_gain(norm, torch.ones_like(g)))))
    if norm.bias is None:
        return edits
    beta_name = norm.bias
    if any(reader not in arch.biases for reader in norm.readers):
        return [*edits, (beta_name, Edit(lambda beta: _divided(beta, gamma(), norm)))]
    edits += [(arch.biases[reader], Edit(_with_beta(source, arch, reader, beta_name))) for reader in norm.readers]
    return [*edits, (beta_name, Edit(torch.zeros_like))]


def _with_beta(source: Source, arch: Arch, reader: str, beta: str) -> Callable[[Tensor], Tensor]:
    """b -> b + W beta, with W and beta as they were."""
    return lambda b: b + channels(exact(source, arch.tied.get(reader, reader)), arch, reader) @ exact(source, beta)


def _divided(beta: Tensor, gamma: Tensor, norm: Norm) -> Tensor:
    lost = (gamma == 0) & (beta != 0)
    if bool(lost.any()):
        channel = int(lost.nonzero()[0, 0])
        raise TransformError(
            f"{norm.weight} is zero in channel {channel} where {norm.bias} is not, and {norm.readers[0]} has no bias "
            "to take it; this model cannot be folded, leave the transform out"
        )
    return torch.where(gamma == 0, 0.0, beta / gamma)
