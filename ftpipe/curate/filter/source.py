"""Rows by where they come from: the way to train one model on each of several data sets."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from pydantic import Field

from ftpipe.curate.filter.base import Filter
from ftpipe.curate.step import StepContext, connection
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError, nearest

if TYPE_CHECKING:
    import pyarrow as pa


class Source(Filter):
    """Keeps the rows whose source, as ingest wrote it down, matches one of the patterns; `*` stands for any text, also across `/`.

    A pattern that no row matches is an error. A row that a step made has the source `step:METHOD`.
    """

    keep: list[str] = Field(min_length=1, description="Sources to keep, such as `base.jsonl` or `*/extra-*.jsonl`.")

    def judge(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import pyarrow as pa

        with connection(rows, ctx) as con:
            names = [name for name, in con.sql("select distinct source from rows where split = 'train' order by source").fetchall()]
            unmatched = [p for p in self.keep if not any(fnmatchcase(name, p) for name in names)]
            if unmatched:
                raise DataError(f"no train row comes from {unmatched[0]!r}", where=f"{ctx.name} (source.keep)", remedy=nearest(unmatched[0], names))
            con.register("wanted", pa.table({"source": pa.array([n for n in names if any(fnmatchcase(n, p) for p in self.keep)], pa.string())}))
            return con.sql(
                "select row_id, kept, if(kept, null, 'from another source') as reason, null::double as score from "
                "(select row_id, source in (select source from wanted) as kept from rows where split = 'train') order by row_id"
            ).to_arrow_table()
