"""The base of deduplication."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.curate.step import CurateStep, StepContext
from ftpipe.curate.text import Part, row_text
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError
from ftpipe.stages.base import Ref

if TYPE_CHECKING:
    import duckdb
    import numpy as np
    import pyarrow as pa

LONGEST = "characters"


class Dedup(CurateStep):
    """Drops rows that repeat others. A subclass writes `duplicates`; the base links each dropped row to its keeper."""

    slot: ClassVar[str] = "curate/dedup"
    reason: ClassVar[str] = "duplicate"
    """What the decisions say of a dropped row, unless the table has a column `reason`."""
    names_keepers: ClassVar[bool] = True
    """Every dropped row has a keeper; False for a method that may drop a row for what it shares with many."""

    part: Part = Field(default="all", description="What is compared: all of a row, its prompt, or its answer.")
    prefer: str | None = Field(default=None, description="Annotation by which the row to keep is chosen (largest value), or `characters` for the longest "
                               "text; otherwise, and between equals, the smallest row_id.")
    prefer_smallest: bool = Field(default=False, description="Keep the row with the smallest value of `prefer` instead.")
    heldout: bool = Field(default=False, description="Compare with the held-out rows too: train rows that repeat one are dropped.")
    against: list[Ref] = Field(default_factory=list, description="Further stages, such as evaluation sets: train rows that repeat one of theirs are dropped.")

    @abstractmethod
    def duplicates(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        """Which train rows to drop: row_id, keeper (row_id of the row that stays in its place), score (likeness to the keeper), perhaps reason.

        A keeper must itself stay, unless it is a held-out row or one of another stage. The answer must not depend on the order of the rows.
        """

    def replacements(self, rows: RowSet, ctx: StepContext) -> Iterable[dict[str, Any]]:
        """New rows in place of dropped ones, in the form of `Synthesizer.make`; called after `duplicates`. None by default."""
        return ()

    def rank(self, rows: RowSet, ctx: StepContext, con: duckdb.DuckDBPyConnection) -> tuple[int, int]:
        """Create the view `compared`: the columns of `rows`, origin (0 for train rows, 1 for held-out ones, 2, 3, ... for those of `against`) and rank
        (from 0: of two duplicates the lower one is kept); and the table `ranked` (origin, row_id, rank). Rows that are not train rows come first.

        Returns how many rows there are to compare, and how many of them are not train rows.
        """
        sources = ["select 0 as origin, * from rows where split = 'train'"]
        if self.heldout:
            sources.append("select 1 as origin, * from rows where split = 'heldout'")
        for i, ref in enumerate(self.against):
            RowSet(ctx.inputs[ref]).register(con, f"against_{i}")
            sources.append(f"select {i + 2} as origin, * from against_{i}")
        con.execute("create view sources as " + " union all by name ".join(sources))
        preferred, join = "", ""
        if self.prefer == LONGEST:
            preferred = f"length({row_text(self.part)})"
        elif self.prefer is not None:
            table = rows.annotation(self.prefer)
            if table is None:
                raise DataError(f"no step before this one annotates {self.prefer!r}", where=f"{self.name()}.prefer",
                                remedy=f"put the step that does before it, or write {LONGEST}")
            con.register("preferred", table)
            preferred, join = f'"{self.prefer}"', "left join preferred using (row_id)"
        order = f"{preferred} {'asc' if self.prefer_smallest else 'desc'} nulls last," if preferred else ""
        con.execute(f"create table ranked as select origin, row_id, row_number() over (order by origin = 0, {order} row_id, origin) - 1 as rank "
                    f"from sources {join}")
        con.execute("create view compared as select s.*, r.rank from sources s join ranked r using (origin, row_id)")
        return con.sql("select count(*), count(*) filter (where origin > 0) from ranked").fetchall()[0]

    def found(self, con: duckdb.DuckDBPyConnection, dropped: np.ndarray, keepers: np.ndarray, likeness: np.ndarray) -> pa.Table:
        """The answer of `duplicates` from the ranks of rows."""
        import pyarrow as pa

        ranked = con.sql("select row_id, origin from ranked order by rank").to_arrow_table()
        keeper = ranked.take(pa.array(keepers))
        return pa.table({"row_id": ranked["row_id"].take(pa.array(dropped)), "keeper": keeper["row_id"], "score": pa.array(likeness),
                         "origin": keeper["origin"]})

    def reasons(self, origin: pa.ChunkedArray) -> pa.Array:
        """The reason for each dropped row, from where its keeper comes from."""
        import pyarrow as pa

        names = [self.reason, f"{self.reason} of a held-out row", *(f"{self.reason} of a row of {ref}" for ref in self.against)]
        return pa.DictionaryArray.from_arrays(origin.combine_chunks().cast(pa.int32()), names).cast(pa.string())

    def apply(self, rows: RowSet, ctx: StepContext) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        found = self.duplicates(rows, ctx)
        n = found.num_rows
        origin = found["origin"] if "origin" in found.column_names else pa.chunked_array([pa.array([0] * n, pa.int32())])
        own = pc.equal(origin, 0)
        lost = found.filter(pc.and_(own, pc.is_in(found["keeper"], value_set=found["row_id"].combine_chunks())))
        if lost.num_rows:
            raise self.fault(f"dropped {lost['keeper'][0]}, the keeper of {lost['row_id'][0]}")
        if self.names_keepers and found["keeper"].null_count:
            raise self.fault("dropped a row without naming its keeper")
        columns = {"row_id": found["row_id"], "kept": pa.array([False] * n, pa.bool_()), "keeper": found["keeper"], "score": found["score"],
                   "reason": found["reason"] if "reason" in found.column_names else self.reasons(origin)}
        self.conclude(rows, ctx, pa.table(columns), made=self.replacements(rows, ctx))
