"""The base of synthesis."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.curate.step import CurateStep, StepContext
from ftpipe.data.rows import RowSet

if TYPE_CHECKING:
    import pyarrow as pa


class Synthesizer(CurateStep):
    """Makes new rows from those there are. A subclass writes `make`; the rows it started from stay, unless `drop` names them."""

    slot: ClassVar[str] = "curate/synthesize"

    @abstractmethod
    def make(self, rows: RowSet, ctx: StepContext) -> Iterable[dict[str, Any]]:
        """New rows, one dict each, made one after the other so that memory stays bounded.

        format, and the columns of that format (`rows_schema`); parents: row_ids it was made from, at least one; perhaps meta (a dict for
        JSON) and group (that of the first parent by default, so that a later split cannot tear them apart). The base adds row_id, source,
        line and split, and leaves out a row that says what another row of the pipeline says already.

        replaces: the row_id of a train row in whose place the new one stands, as often and when that one was seen; it is dropped for `reason`.
        Such a row is left out only if it says what a held-out row says, and then the row it was to replace stays.
        """

    def drop(self, rows: RowSet, ctx: StepContext) -> pa.Table | None:
        """Rows that do not stay (row_id, reason), or None; called before `make`."""
        return None

    def apply(self, rows: RowSet, ctx: StepContext) -> None:
        import pyarrow as pa

        gone = self.drop(rows, ctx)
        if gone is None:
            verdicts = pa.table({"row_id": pa.array([], pa.string())})
        else:
            verdicts = gone.append_column("kept", pa.array([False] * gone.num_rows, pa.bool_()))
        self.conclude(rows, ctx, verdicts, made=self.make(rows, ctx))
