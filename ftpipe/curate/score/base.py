"""The base of scorers."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from ftpipe.curate.step import CurateStep, StepContext
from ftpipe.data.rows import RowSet

if TYPE_CHECKING:
    import pyarrow as pa


class Scorer(CurateStep):
    """Finds something out about every row and drops none. A subclass writes `annotate`."""

    slot: ClassVar[str] = "curate/score"

    @abstractmethod
    def annotate(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        """One line for every train row: row_id, and a column for each thing found out (null where it could not be).

        The column names are what later steps ask `rows.annotation` for. The first numeric column is shown as the row's score.
        """

    def apply(self, rows: RowSet, ctx: StepContext) -> None:
        import pyarrow as pa

        table = self.annotate(rows, ctx)
        expected = rows.table(columns=["row_id"]).num_rows
        if table.num_rows != expected:
            raise self.fault(f"annotated {table.num_rows} of {expected} rows")
        if len(table.column_names) < 2:
            raise self.fault("found nothing out: there is no column beside row_id")
        ctx.annotate(table)
        numeric = [f.name for f in table.schema if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)]
        self.conclude(rows, ctx, pa.table({"row_id": table["row_id"], "score": table[numeric[0]]}) if numeric else table.select(["row_id"]))
