"""The base of deduplication."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ftpipe.curate.step import CurateStep, StepContext
from ftpipe.curate.text import Part
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa


class Dedup(CurateStep):
    """Drops rows that repeat others. A subclass writes `duplicates`; the base links each dropped row to its keeper."""

    slot: ClassVar[str] = "curate/dedup"
    reason: ClassVar[str] = "duplicate"
    """What the decisions say of a dropped row, unless the table has a column `reason`."""

    part: Part = Field(default="all", description="What is compared: all of a row, its prompt, or its answer.")
    prefer: str | None = Field(default=None, description="Annotation by which the row to keep is chosen (largest value); otherwise the smallest row_id.")
    prefer_smallest: bool = Field(default=False, description="Keep the row with the smallest value of `prefer` instead.")

    @abstractmethod
    def duplicates(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        """Which train rows to drop: row_id, keeper (row_id of the row that stays in its place), score (likeness to the keeper), perhaps reason.

        A keeper must itself stay. The answer must not depend on the order of the rows.
        """

    def rank(self, rows: RowSet, con: duckdb.DuckDBPyConnection) -> int:
        """Create the table `ranked` (row_id, rank from 0: of two duplicates the lower one is kept) of the train rows; returns how many."""
        if self.prefer is None:
            con.execute("create table ranked as select row_id, row_number() over (order by row_id) - 1 as rank from rows where split = 'train'")
        else:
            table = rows.annotation(self.prefer)
            if table is None:
                raise DataError(f"no step before this one annotates {self.prefer!r}", where=f"{self.name()}.prefer", remedy="put the step that does before it")
            con.register("preferred", table)
            direction = "asc" if self.prefer_smallest else "desc"
            con.execute(f'create table ranked as select row_id, row_number() over (order by "{self.prefer}" {direction} nulls last, row_id) - 1 as rank '
                        f"from rows left join preferred using (row_id) where split = 'train'")
            con.unregister("preferred")
        return con.sql("select count(*) from ranked").fetchall()[0][0]

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
