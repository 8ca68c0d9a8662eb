"""The search for near duplicates among rows that share a band: which rows stay, and for each other one the row it is like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ftpipe.curate.dedup._bands import Index
from ftpipe.curate.shingles import Sets
from ftpipe.tables import connect

if TYPE_CHECKING:
    import duckdb
    import numpy as np


@dataclass
class Search:
    """Greedy in ascending order of rank: a row stays if and only if no row that stays, is of lower rank and shares a band with it is near it.

    This is the lexicographically first maximal independent set of the graph of near pairs, so what stays has no near pair left that a second
    run would find, and it depends on nothing but the ranks. It is found in rounds (Blelloch, Fineman and Shun, 2012, "Greedy sequential
    maximal independent set and matching are parallel on average"): a row that is the first undecided one of all its buckets stays; the
    others of these buckets are compared with it alone (star edges, never all pairs) and those near it are dropped. A bucket of n equal rows
    costs n - 1 comparisons. A bucket in which `leaders` rows have stayed is given up; this bounds the cost of buckets of false candidates.

    Buckets are DuckDB tables, filled band by band, that spill to `scratch`.

    Attributes:
        threshold: Jaccard similarity from which rows are near; that of every pair compared is the true one.
        compared, rounds: pairs and rounds it took.
        given_up: rows that were left in buckets given up, counted once for each.
        largest: the largest buckets, as (first row, number of rows).
    """

    index: Index
    sets: Sets
    threshold: float
    leaders: int
    scratch: Path
    progress: Callable[[float], None] = lambda share: None
    compared: int = 0
    rounds: int = 0
    given_up: int = 0
    largest: list[tuple[int, int]] = field(default_factory=list)

    def run(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Dropped rows (ascending), the keeper of each, and their Jaccard similarity."""
        import numpy as np

        found = []
        with connect(self.scratch) as con:
            self._fill(con)
            start = left = _count(con, "member")
            while left:
                self.rounds += 1
                found.append(self._round(con))
                left = _count(con, "member")
                self.progress(1 - left / start)
        row, keeper, j = (np.concatenate([f[i] for f in found] or [np.empty(0, t)]) for i, t in enumerate((np.int64, np.int64, np.float64)))
        order = np.argsort(row)
        return row[order], keeper[order], j[order]

    def _fill(self, con: duckdb.DuckDBPyConnection) -> None:
        """Table `member` (key of a bucket, row id, led: how many of the bucket's rows have stayed so far) of all buckets of two or more rows."""
        import numpy as np
        import pyarrow as pa

        con.execute("create table member (key ubigint, id bigint, led integer)")
        ids = np.flatnonzero(self.index.sizes > 0)
        largest: dict[int, int] = {}
        for band in range(self.index.bands):
            con.register("band", pa.table({"id": ids, "key": np.asarray(self.index.keys[band])[ids]}))
            con.execute("create or replace temp table bucket as select key, min(id) as id, count(*) as n from band group by key having count(*) > 1")
            con.execute("insert into member select key, band.id, 0 from band join bucket using (key)")
            for first, n in con.sql("select id, n from bucket order by n desc, id limit 10").fetchall():
                largest[first] = max(n, largest.get(first, 0))
            con.unregister("band")
        self.largest = sorted(largest.items(), key=lambda e: (-e[1], e[0]))[:10]

    def _round(self, con: duckdb.DuckDBPyConnection) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One round; returns (row, keeper, similarity) of the rows it drops."""
        import numpy as np
        import pyarrow as pa

        con.execute("create or replace table head as select key, min(id) as id from member group by key")
        con.execute("""create or replace table leader as
                       with heads as (select id, count(*) as n from head group by id),
                            open as (select id, count(*) as n from member semi join heads using (id) group by id)
                       select id from heads join open using (id, n)""")
        pairs = con.sql("""select distinct leader.id as leader, member.id as row from member join head using (key) join leader on leader.id = head.id
                           where member.id <> leader.id""").to_arrow_table()
        leader, row = pairs["leader"].to_numpy(), pairs["row"].to_numpy()
        j = self.sets.jaccard(leader, row, at_least=self.threshold)
        self.compared += len(row)
        near = j >= self.threshold
        leader, row, j = leader[near], row[near], j[near]
        order = np.lexsort((leader, -j, row))  # of several leaders near a row, the most alike keeps it
        leader, row, j = leader[order], row[order], j[order]
        first = np.concatenate([[True], row[1:] != row[:-1]]) if len(row) else np.empty(0, bool)
        leader, row, j = leader[first], row[first], j[first]
        con.register("gone", pa.table({"id": row}))
        con.execute("""create or replace table rest as
                       select member.key, member.id, member.led + (leader.id is not null)::integer as led
                       from member join head using (key) left join leader on leader.id = head.id
                       where member.id <> coalesce(leader.id, -1) and member.id not in (select id from gone)""")
        con.unregister("gone")
        con.execute(f"""create or replace table open_bucket as select key from rest group by key having count(*) > 1 and max(led) < {self.leaders}""")
        self.given_up += con.sql(f"select count(*) from rest where led >= {self.leaders}").fetchall()[0][0]
        con.execute("create or replace table member as select rest.* from rest semi join open_bucket using (key)")
        return row, leader, j


def _count(con: duckdb.DuckDBPyConnection, table: str) -> int:
    return con.sql(f"select count(*) from {table}").fetchall()[0][0]
