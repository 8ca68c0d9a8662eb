"""The base of ordering."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from ftpipe.curate.step import CurateStep, StepContext
from ftpipe.data.rows import RowSet

if TYPE_CHECKING:
    import pyarrow as pa


class Orderer(CurateStep):
    """Decides when each row is seen. A subclass writes `position`. Training follows the order if its own shuffling is off."""

    slot: ClassVar[str] = "curate/order"

    @abstractmethod
    def position(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        """For every train row: row_id, key (anything that sorts, ascending; null comes last). Rows of equal key stay as they were."""

    def apply(self, rows: RowSet, ctx: StepContext) -> None:
        table = self.position(rows, ctx)
        expected = rows.table(columns=["row_id"]).num_rows
        if table.num_rows != expected:
            raise self.fault(f"placed {table.num_rows} of {expected} rows")
        self.conclude(rows, ctx, table)
