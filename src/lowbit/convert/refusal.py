"""What an exporter cannot hold, as one error."""

from __future__ import annotations

from collections.abc import Iterable

from lowbit.errors import ExportError
from lowbit.interchange.exporters.exporter import Exporter, Problem, exporters
from lowbit.interchange.tensors import Contents

_SHOWN = 5


def refuse(kind: Exporter, problems: Iterable[Problem], instead: str = "") -> None:
    """ExportError with every problem, if there is any; problems that tensors share are said once. instead: a command to name."""
    groups: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        groups.setdefault((problem.reason, problem.nearest), []).append(problem.tensor)
    if not groups:
        return
    parts = []
    for (reason, near), names in groups.items():
        named = [n for n in names if n]
        who = f"{named[0]}: " if len(named) == 1 else f"{len(named)} tensors such as {named[0]}: " if named else ""
        parts.append(f"{who}{reason}{f'; the nearest is {near}' if near else ''}")
    more = f"; and {len(parts) - _SHOWN} other reasons" if len(parts) > _SHOWN else ""
    do = f"; this works: {instead}" if instead else ""
    raise ExportError(f"{kind.name} cannot hold this model: {'; '.join(parts[:_SHOWN])}{more}{do}")


def check_kv(kind: Exporter, kv: str, model: Contents) -> None:
    """ExportError when the exporter has no KV cache of that kind, or none of this model."""
    if kv not in kind.kv:
        able = ", ".join(f"{name} has {' and '.join(t.kv)}" for name, t in exporters().items() if t.kv)
        raise ExportError(f"{kind.name} cannot hold scales of a KV cache in {kv!r} ({able}); leave --kv out")
    problems = kind.check_kv(kv, model)
    if problems:
        first = problems[0]
        raise ExportError(f"{kind.name} cannot hold this model: {first.reason}; the nearest is {first.nearest}")
