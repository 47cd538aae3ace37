"""What an allocation of formats to layers is: a recipe, its plan, a row for each tensor, and what was found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.display import Displayed
from lowbit.formats import Format
from lowbit.planning.plan import Plan
from lowbit.recipes.layer_globs import block_of, role_of
from lowbit.recipes.recipe import Recipe


@dataclass(frozen=True)
class Row:
    """One tensor of an allocation. `kl`: predicted nats per token, None where it was not measured; `fixed`: by recipe."""

    name: str
    kind: str
    count: int
    format: Format | None
    bits: float
    kl: float | None
    fixed: bool


@dataclass(frozen=True, repr=False)
class Allocation(Displayed):
    """A recipe with a format for each layer, its plan, and what is expected of it.

    `predicted_kl`: sum over all measured tensors, nats per token. `gap`: by how much the allocated part of it may
    exceed the least possible one; 0 where the optimum is proven. `room`: bytes within which `plan.output_bytes`
    had to stay, where the target was one of bytes.
    """

    recipe: Recipe
    plan: Plan
    rows: tuple[Row, ...]
    predicted_kl: float
    gap: float
    room: int | None = None

    def _brief(self) -> str:
        return f"{self.plan.label}, {self.bits:.3f} bits per weight, predicted KL {self.predicted_kl:.4f}"

    @property
    def bits(self) -> float:
        """Bits per weight over the tensors that were allocated."""
        return _mean_bits([r for r in self.rows if not r.fixed])

    def by_role(self) -> dict[str, float]:
        """Bits per weight of each kind of layer (`model.layers.*.mlp.down_proj`), the most first."""
        return self._grouped(role_of)

    def by_block(self) -> dict[int, float]:
        """Bits per weight of each block of the model, the most first."""
        return {b: bits for b, bits in self._grouped(block_of).items() if b is not None}

    def _grouped(self, key: Callable[[str], Any]) -> dict[Any, float]:
        groups: defaultdict[Any, list[Row]] = defaultdict(list)
        for row in self.rows:
            if not row.fixed:
                groups[key(row.name)].append(row)
        return dict(sorted(((k, _mean_bits(rows)) for k, rows in groups.items()), key=lambda kv: -kv[1]))

    def found_sensitive(self, margin: float = 0.5) -> list[str]:
        """Sentences on what got at least `margin` bits more or fewer than the average: found by measuring."""
        mean, out = self.bits, []
        for what, groups in (("", self.by_role()), ("block ", self.by_block())):
            for name, bits in groups.items():
                if abs(bits - mean) >= margin and len(groups) > 1:
                    out.append(f"{what}{name}: {bits:.2f} bits per weight, {mean:.2f} on average")
        return out


def formats_of(rows: Sequence[Row]) -> dict[str, int]:
    """Format text -> weights that have it, the most first."""
    out: defaultdict[str, int] = defaultdict(int)
    for row in rows:
        out[str(row.format) if row.format is not None else "kept"] += row.count
    return dict(sorted(out.items(), key=lambda kv: -kv[1]))


def _mean_bits(rows: Sequence[Row]) -> float:
    return sum(r.bits * r.count for r in rows) / max(1, sum(r.count for r in rows))
