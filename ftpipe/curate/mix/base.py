"""The base of mixing."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from ftpipe.curate.step import CurateStep, StepContext
from ftpipe.data.rows import RowSet

if TYPE_CHECKING:
    import pyarrow as pa


class Mixer(CurateStep):
    """Decides how often an epoch shows each row. A subclass writes `times`."""

    slot: ClassVar[str] = "curate/mix"
    reason: ClassVar[str] = "mixed out"

    @abstractmethod
    def times(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        """For every train row: row_id, times (whole number, 0 drops it), perhaps score (its weight in the mixture).

        `times` multiplies what earlier steps decided (column `times` of the rows).
        """

    def apply(self, rows: RowSet, ctx: StepContext) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        table = self.times(rows, ctx)
        expected = rows.table(columns=["row_id"]).num_rows
        if table.num_rows != expected:
            raise self.fault(f"gave a number for {table.num_rows} of {expected} rows")
        if pc.min(table["times"]).as_py() is not None and pc.min(table["times"]).as_py() < 0:
            raise self.fault("gave a negative number")
        reason = pc.if_else(pc.equal(table["times"], 0), self.reason, pa.scalar(None, pa.string()))
        self.conclude(rows, ctx, table.append_column("reason", reason))
