"""The search for near duplicates among rows that share a band: which rows stay, and for each other one the row it is like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

    Buckets are DuckDB tables, filled band by band, that spill to `scratch`; when at most `in_memory` lines of them are left, the rounds go on in
    arrays, which are quicker for few.

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
    in_memory: int = 5_000_000
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
            while left > self.in_memory:
                self.rounds += 1
                found.append(self._round(con))
                left = _count(con, "member")
                self.progress(1 - left / start)
            rest = con.sql("select key, id, led from member").to_arrow_table() if left else None
        if rest is not None:
            found += self._finish(*(rest[c].to_numpy() for c in ("key", "id", "led")))
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
        import pyarrow as pa

        con.execute("create or replace table head as select key, min(id) as id from member group by key")
        con.execute("""create or replace table leader as
                       with heads as (select id, count(*) as n from head group by id),
                            open as (select id, count(*) as n from member semi join heads using (id) group by id)
                       select id from heads join open using (id, n)""")
        pairs = con.sql("""select distinct leader.id as leader, member.id as row from member join head using (key) join leader on leader.id = head.id
                           where member.id <> leader.id""").to_arrow_table()
        row, leader, j = self._near(pairs["leader"].to_numpy(), pairs["row"].to_numpy())
        con.register("gone", pa.table({"id": row}))
        con.execute("""create or replace table rest as
                       select member.key, member.id, member.led + (leader.id is not null)::integer as led
                       from member join head using (key) left join leader on leader.id = head.id
                       where member.id <> coalesce(leader.id, -1) and member.id not in (select id from gone)""")
        con.unregister("gone")
        con.execute(f"create or replace table open_bucket as select key from rest group by key having count(*) > 1 and max(led) < {self.leaders}")
        self.given_up += con.sql(f"select count(*) from rest where led >= {self.leaders}").fetchall()[0][0]
        con.execute("create or replace table member as select rest.* from rest semi join open_bucket using (key)")
        return row, leader, j

    def _finish(self, key: np.ndarray, ids: np.ndarray, led: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The same rounds on arrays with a line for each row of each bucket; gives what each round drops."""
        import numpy as np

        order = np.lexsort((ids, key))
        names, row = np.unique(ids[order], return_inverse=True)  # numbers without gaps, in the same order
        key, led, n = key[order], led[order], len(names)
        while len(row):
            self.rounds += 1
            first = np.concatenate([[True], key[1:] != key[:-1]])
            head = row[first][np.cumsum(first) - 1]
            heads = np.bincount(row[first], minlength=n)
            leads = (heads > 0) & (heads == np.bincount(row, minlength=n))
            star = leads[head] & ~first
            pairs = np.unique(head[star] * n + row[star])
            dropped, keeper, j = self._near(names[pairs // n], names[pairs % n])
            yield dropped, keeper, j
            gone = leads.copy()
            gone[np.searchsorted(names, dropped)] = True
            led = led + leads[head]
            stay = ~gone[row]
            self.given_up += int((stay & (led >= self.leaders)).sum())
            stay &= led < self.leaders
            key, row, led = key[stay], row[stay], led[stay]
            same = key[1:] == key[:-1]
            pair = np.concatenate([[False], same]) | np.concatenate([same, [False]]) if len(key) else np.empty(0, bool)
            key, row, led = key[pair], row[pair], led[pair]

    def _near(self, leader: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, leader, similarity) of the rows that are near a leader; of several, the most alike, then the first, keeps it."""
        import numpy as np

        j = self.sets.jaccard(leader, row, at_least=self.threshold)
        self.compared += len(row)
        near = j >= self.threshold
        leader, row, j = leader[near], row[near], j[near]
        order = np.lexsort((leader, -j, row))
        leader, row, j = leader[order], row[order], j[order]
        first = np.concatenate([[True], row[1:] != row[:-1]]) if len(row) else np.empty(0, bool)
        return row[first], leader[first], j[first]


def _count(con: duckdb.DuckDBPyConnection, table: str) -> int:
    return con.sql(f"select count(*) from {table}").fetchall()[0][0]
