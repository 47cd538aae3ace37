"""What `compare` found: a list of rows that shows itself as one table."""

from __future__ import annotations

from typing import Any

from lowbit.display import Displayed
from lowbit.measure.compare import CompareRow
from lowbit.report.tables import compare_json, compare_records, markdown_compare


class Comparison(Displayed, list[CompareRow]):
    """The rows, the float model's first, as a list; printed it is the table of `lowbit compare`."""

    def _brief(self) -> str:
        failed = sum(row.error is not None for row in self)
        recipes = ", ".join(row.recipe for row in self if not row.is_base)
        return f"{recipes}; {failed} failed" if failed else recipes

    def records(self) -> list[dict[str, Any]]:
        """One flat dict per row, as `pandas.DataFrame` takes them: sizes in bits and MiB, KL in nats per token, speeds in tokens per
        second; None for what was not measured."""
        return compare_records(self)

    def to_json(self) -> str:
        """The records as JSON text; numbers that are not finite are text."""
        return compare_json(self)

    def to_markdown(self) -> str:
        """The table as Markdown text."""
        return markdown_compare(self)
