"""The base of filters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.curate.step import CurateStep, StepContext
from ftpipe.data.rows import RowSet

if TYPE_CHECKING:
    import pyarrow as pa


class Filter(CurateStep):
    """Keeps or drops each row. A subclass writes `judge`."""

    slot: ClassVar[str] = "curate/filter"

    @abstractmethod
    def judge(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        """A verdict on every train row: row_id, kept (bool), score (number or null), reason (short phrase, set for each dropped row).

        One that looks at rows batch by batch in Python leaves the batches to `ctx.env.engine.map`, which may have them looked at elsewhere.
        A column `keeper` may name the row that a dropped one was found too like. Keep the reasons few: they are counted.
        """

    def replacements(self, rows: RowSet, ctx: StepContext) -> Iterable[dict[str, Any]]:
        """New rows in place of dropped ones, in the form of `Synthesizer.make`; called after `judge`. None by default."""
        return ()

    def apply(self, rows: RowSet, ctx: StepContext) -> None:
        verdicts = self.judge(rows, ctx)
        expected = rows.table(columns=["row_id"]).num_rows
        if verdicts.num_rows != expected or verdicts["kept"].null_count:
            raise self.fault(f"judged {verdicts.num_rows - verdicts['kept'].null_count} of {expected} rows")
        self.conclude(rows, ctx, verdicts, made=self.replacements(rows, ctx))
