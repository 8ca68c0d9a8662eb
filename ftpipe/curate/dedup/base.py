"""The base of deduplication."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from ftpipe.curate.step import CurateStep, StepContext
from ftpipe.data.rows import RowSet

if TYPE_CHECKING:
    import pyarrow as pa


class Dedup(CurateStep):
    """Drops rows that repeat others. A subclass writes `duplicates`; the base links each dropped row to its keeper."""

    slot: ClassVar[str] = "curate/dedup"
    reason: ClassVar[str] = "duplicate"
    """What the decisions say of a dropped row, unless the table has a column `reason`."""

    @abstractmethod
    def duplicates(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        """Which train rows to drop: row_id, keeper (row_id of the row that stays in its place), score (likeness to the keeper), perhaps reason.

        A keeper must itself stay. The answer must not depend on the order of the rows.
        """

    def apply(self, rows: RowSet, ctx: StepContext) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        found = self.duplicates(rows, ctx)
        n = found.num_rows
        lost = found.filter(pc.is_in(found["keeper"], value_set=found["row_id"].combine_chunks()))
        if lost.num_rows:
            raise self.fault(f"dropped {lost['keeper'][0]}, the keeper of {lost['row_id'][0]}")
        if found["keeper"].null_count:
            raise self.fault("dropped a row without naming its keeper")
        columns = {"row_id": found["row_id"], "kept": pa.array([False] * n, pa.bool_()), "keeper": found["keeper"], "score": found["score"],
                   "reason": found["reason"] if "reason" in found.column_names else pa.array([self.reason] * n, pa.string())}
        self.conclude(rows, ctx, pa.table(columns))
