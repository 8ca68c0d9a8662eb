"""A curriculum by what an earlier step found out about the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ftpipe.curate.order.base import Orderer
from ftpipe.curate.step import StepContext, connection
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


class ByAnnotation(Orderer):
    """Rows in the order of an annotation: short before long, easy before hard. Rows without a value come last, equal ones as they were."""

    column: str = Field(description="Annotation to order by, such as tokens or loss.")
    descending: bool = Field(default=False, description="Largest value first.")

    def position(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        table = rows.annotation(self.column)
        if table is None:
            raise DataError(f"no step before this one annotates {self.column!r}", where=f"{ctx.name} (by_annotation.column)",
                            remedy="put the step that does before it")
        with connection(rows, ctx) as con:
            con.register("annotated", table)
            direction = "desc" if self.descending else "asc"
            rank = f'dense_rank() over (order by "{self.column}" {direction} nulls last)'
            return con.sql(f"""select row_id, case when "{self.column}" is not null then {rank} end as key
                               from (select row_id, "{self.column}" from rows left join annotated using (row_id) where split = 'train')
                               order by row_id""").to_arrow_table()
