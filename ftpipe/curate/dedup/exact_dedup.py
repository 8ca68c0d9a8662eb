"""Exact duplicates, by a hash of the normalised text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ftpipe.curate.dedup.base import Dedup
from ftpipe.curate.step import StepContext, connection
from ftpipe.curate.text import exact_text
from ftpipe.data.rows import RowSet

if TYPE_CHECKING:
    import pyarrow as pa


class ExactDedup(Dedup):
    """Keeps one of all rows that say the same.

    Compared is the first half (128 bits) of the SHA-256 of the row's turns with their roles, in Unicode normal form C, with runs of white
    space made one space. Case counts unless `ignore_case`. A row whose compared part is empty is kept.
    """

    libraries = ("duckdb",)  # its Unicode tables
    reason = "exact duplicate"

    ignore_case: bool = Field(default=False, description="Rows that differ in case alone are duplicates.")
    ignore_whitespace: bool = Field(default=True, description="Rows that differ in white space alone are duplicates.")

    def duplicates(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        with connection(rows, ctx) as con:
            self.rank(rows, ctx, con)
            said = exact_text(self.part, ignore_case=self.ignore_case, ignore_whitespace=self.ignore_whitespace)
            con.execute(f"""create table hashed as select origin, row_id, rank, left(sha256(said), 32) as h
                            from (select origin, row_id, rank, {said} as said from compared) where said <> ''""")
            found = con.sql("""with one as (select h, min(rank) as rank from hashed group by h having count(*) > 1)
                               select d.row_id, k.row_id as keeper, 1.0::double as score, k.origin
                               from one join hashed k using (h, rank) join hashed d on d.h = one.h and d.rank <> one.rank
                               where d.origin = 0 order by d.row_id""").to_arrow_table()
            largest = con.sql("select count(*) as rows, min_by(row_id, rank) as row_id from hashed group by h having count(*) > 1 "
                              "order by rows desc, row_id limit 10")
            ctx.report({"groups": con.sql("select count(*) from (select 1 from hashed group by h having count(*) > 1)").fetchall()[0][0],
                        "largest": [{"rows": n, "row_id": r} for n, r in largest.fetchall()]})
        return found
