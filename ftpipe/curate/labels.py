"""What groups rows: a column that every row has, or what an earlier step found out about them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("source", "group", "format")


def labels(rows: RowSet, by: str, split: str, where: str) -> pa.Table:
    """row_id and label (text) of the rows of a split, ascending by row_id: the column `by`, or the nearest annotation of that name ('' where it has none).

    Raises DataError, at `where`, if there is neither.
    """
    if by in COLUMNS:
        return rows.table(split, ["row_id", by]).sort_by("row_id").rename_columns(["row_id", "label"])
    table = rows.annotation(by)
    if table is None:
        raise DataError(f"no step before this one annotates {by!r}", where=where, remedy="use source, group or format")
    with rows.view() as con:
        con.register("labels", table)
        query = f"select row_id, coalesce(\"{by}\"::varchar, '') as label from rows left join labels using (row_id) where split = $split order by row_id"
        return con.sql(query, params={"split": split}).to_arrow_table()
