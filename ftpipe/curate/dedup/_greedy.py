"""The search for near duplicates among rows that share a band: which rows stay, and for each other one the row it is like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ftpipe.curate.dedup._bands import Index
from ftpipe.curate.shingles import Sets

if TYPE_CHECKING:
    import numpy as np

AT_ONCE = 2**22
"""Lines, or pairs to compare, that are in memory at a time."""


class Lines:
    """The rows of all buckets, a line (bucket << 32 | row, uint64) for each, ascending, in a file that is read in parts of whole buckets."""

    def __init__(self, path: Path):
        self.path, self.parts, self.waiting = path, [], []
        path.write_bytes(b"")

    def append(self, lines: np.ndarray) -> None:
        """Add whole buckets."""
        self.waiting.append(lines)
        if sum(map(len, self.waiting)) >= AT_ONCE:
            self.close()

    def close(self) -> None:
        """Write what is left as one more part."""
        with self.path.open("ab") as out:
            for lines in self.waiting:
                out.write(lines)
        self.parts += [n] if (n := sum(map(len, self.waiting))) else []
        self.waiting = []

    def __len__(self) -> int:
        return sum(self.parts)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(bucket, row) of the lines of each part, int64."""
        import numpy as np

        with self.path.open("rb") as file:
            for n in self.parts:
                lines = np.fromfile(file, np.uint64, n)
                yield (lines >> np.uint64(32)).astype(np.int64), (lines & np.uint64(2**32 - 1)).astype(np.int64)


@dataclass
class Search:
    """Greedy in ascending order of rank: a row stays if and only if no row that stays, is of lower rank and shares a band with it is near it.

    This is the lexicographically first maximal independent set of the graph of near pairs, so what stays has no near pair left that a second
    run would find, and it depends on nothing but the ranks. It is found in rounds (Blelloch, Fineman and Shun, 2012, "Greedy sequential
    maximal independent set and matching are parallel on average"): a row that is the first undecided one of all its buckets stays; the
    others of these buckets are compared with it alone (star edges, never all pairs) and those near it are dropped. A bucket of n nearly equal
    rows costs n - 1 comparisons. A bucket in which `leaders` rows have stayed is given up; this bounds the cost of buckets of false candidates.

    Rows of equal sets share the fate of the first of them, so that one alone takes part. The lines of the buckets are in files in `scratch`; in
    memory are some 40 bytes for each row, 2 for each bucket, and one part of the lines.

    Attributes:
        threshold: Jaccard similarity from which rows are near; that of every pair compared is the true one.
        fixed: rows of a rank below this stay, whatever they are like.
        compared, rounds: pairs and rounds it took. equal: rows dropped because an earlier one has the same shingles.
        given_up: rows that were left in buckets given up, counted once for each.
        largest: the largest buckets, as (first row, number of rows), and groups of rows of equal sets.
    """

    index: Index
    sets: Sets
    threshold: float
    leaders: int
    scratch: Path
    fixed: int = 0
    progress: Callable[[float], None] = lambda share: None
    compared: int = 0
    equal: int = 0
    rounds: int = 0
    given_up: int = 0
    largest: list[tuple[int, int]] = field(default_factory=list)

    def run(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Dropped rows (ascending), the keeper of each, and their Jaccard similarity."""
        import numpy as np

        n = self.index.n
        first = self._equals()
        lines = self._lines(first)
        led = np.zeros(self._buckets, np.uint16)
        keeper, similarity = np.full(n, -1, np.int64), np.zeros(n)
        start = len(lines)
        if self.fixed and start:
            lines = self._against(lines, led, keeper, similarity)
        while len(lines):
            self.rounds += 1
            lines = self._round(lines, led, keeper, similarity)
            self.progress(1 - len(lines) / start)
        # rows of equal sets: the first is the keeper, or has one
        keeper, similarity = keeper[first], similarity[first]
        twin = np.flatnonzero((first != np.arange(n)) & (keeper < 0))
        self.equal = int((twin >= self.fixed).sum())
        keeper[twin], similarity[twin] = first[twin], 1.0
        dropped = np.flatnonzero(keeper >= 0)
        dropped = dropped[dropped >= self.fixed]
        return dropped, keeper[dropped], similarity[dropped]

    def _equals(self) -> np.ndarray:
        """(n,) the lowest row of the same shingles as each."""
        import numpy as np

        whole, first = self.index.whole, np.arange(self.index.n)
        order = np.argsort(whole, kind="stable")
        fresh = np.ones(len(order), bool)
        fresh[1:] = whole[order[1:]] != whole[order[:-1]]
        fresh |= self.index.sizes[order] == 0
        heads = np.flatnonzero(fresh)
        many = np.diff(heads, append=len(order))
        first[order] = np.repeat(order[heads], many)
        self._weight = np.zeros(len(order), np.int64)
        self._weight[order[heads]] = many
        self._note(order[heads], many)
        return first

    def _note(self, first: np.ndarray, many: np.ndarray) -> None:
        """Remember the largest of the groups of `many` rows, whose lowest ones are `first`."""
        import numpy as np

        most = np.flatnonzero(many >= max(2, np.partition(many, -10)[-10] if len(many) > 10 else 2))
        most = most[np.lexsort((first[most], -many[most]))[:10]]
        found = dict(self.largest)
        for row, n in zip(first[most].tolist(), many[most].tolist()):
            found[row] = max(n, found.get(row, 0))
        self.largest = sorted(found.items(), key=lambda e: (-e[1], e[0]))[:10]

    def _lines(self, first: np.ndarray) -> Lines:
        """The buckets of all bands."""
        import numpy as np

        these = (first == np.arange(len(first))) & (self.index.sizes > 0)
        lines, self._buckets = Lines(self.scratch / "lines-0"), 0
        for bucket, row in self.index.buckets(these):
            if len(row):
                starts = np.flatnonzero(np.diff(bucket, prepend=-1))
                self._note(row[starts], np.add.reduceat(self._weight[row], starts))
                lines.append(((bucket + self._buckets).astype(np.uint64) << np.uint64(32)) | row.astype(np.uint64))
                self._buckets += int(bucket[-1]) + 1
        lines.close()
        return lines

    def _round(self, lines: Lines, led: np.ndarray, keeper: np.ndarray, similarity: np.ndarray) -> Lines:
        """One round: fills in `keeper` and `similarity` of the rows it drops, counts in `led` how many rows of each bucket have stayed, and returns
        the lines of the rows that are undecided."""
        import numpy as np

        heads, open_ = np.zeros(self.index.n, np.int32), np.zeros(self.index.n, np.int32)
        for bucket, row in lines:
            np.add.at(open_, row, 1)
            np.add.at(heads, row[_firsts(bucket)], 1)
        leads = (heads > 0) & (heads == open_)

        def stars() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for bucket, row in lines:
                first = _firsts(bucket)
                head = row[first][np.cumsum(first) - 1]
                star = leads[head] & ~first
                yield head[star], row[star]

        self._compare(stars(), keeper, similarity)
        for bucket, row in lines:
            at = bucket[_firsts(bucket)]
            led[at] += leads[row[_firsts(bucket)]]
        return self._left(lines, led, ~leads & (keeper < 0))

    def _against(self, lines: Lines, led: np.ndarray, keeper: np.ndarray, similarity: np.ndarray) -> Lines:
        """The same for the fixed rows, which are the first of their buckets: the others are compared with up to `leaders` of them."""
        import numpy as np

        def stars() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for bucket, row in lines:
                start = np.flatnonzero(_firsts(bucket))
                many = np.diff(start, append=len(row))
                own, start = np.repeat(many, many), np.repeat(start, many)
                for i in range(self.leaders):
                    star = np.flatnonzero((i < own) & (row >= self.fixed))
                    star = star[row[start[star] + i] < self.fixed]
                    if not len(star):
                        break
                    yield row[start[star] + i], row[star]

        self._compare(stars(), keeper, similarity)
        for bucket, row in lines:
            at, many = np.unique(bucket[row < self.fixed], return_counts=True)
            led[at] = np.minimum(many, self.leaders)
        return self._left(lines, led, (np.arange(self.index.n) >= self.fixed) & (keeper < 0))

    def _left(self, lines: Lines, led: np.ndarray, undecided: np.ndarray) -> Lines:
        """The lines of undecided rows in buckets of two or more of them that are not given up."""
        import numpy as np

        rest = Lines(lines.path.with_name(f"lines-{self.rounds + 1}"))
        for bucket, row in lines:
            stay = undecided[row]
            bucket, row = bucket[stay], row[stay]
            going = led[bucket] < self.leaders
            self.given_up += int((~going).sum())
            bucket, row = bucket[going], row[going]
            same = np.zeros(len(bucket) + 1, bool)
            np.equal(bucket[1:], bucket[:-1], out=same[1:-1])
            pair = same[1:] | same[:-1]
            rest.append((bucket[pair].astype(np.uint64) << np.uint64(32)) | row[pair].astype(np.uint64))
        rest.close()
        lines.path.unlink()
        return rest

    def _compare(self, stars: Iterator[tuple[np.ndarray, np.ndarray]], keeper: np.ndarray, similarity: np.ndarray) -> None:
        """Compare rows with leaders, and give each row that is near one the most alike of them, of several the first, as its keeper."""
        import numpy as np

        best = np.full(0, 0)
        waiting: list[np.ndarray] = []
        near: list[tuple[np.ndarray, ...]] = []

        def look() -> None:
            pairs = np.unique(np.concatenate(waiting))
            waiting.clear()
            leader, row = (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(2**32 - 1)).astype(np.int64)
            j = self.sets.jaccard(leader, row, at_least=self.threshold)
            self.compared += len(row)
            found = j >= self.threshold
            near.append((leader[found], row[found], j[found]))

        for leader, row in stars:
            waiting.append(np.unique((leader.astype(np.uint64) << np.uint64(32)) | row.astype(np.uint64)))
            if sum(map(len, waiting)) >= AT_ONCE:
                look()
        if waiting:
            look()
        leader, row, j = (np.concatenate([e[i] for e in near]) if near else best for i in range(3))
        order = np.lexsort((-leader, j, row))  # the last of each row is the best
        keeper[row[order]], similarity[row[order]] = leader[order], j[order]


def _firsts(bucket: np.ndarray) -> np.ndarray:
    """Which lines are the first of their bucket."""
    import numpy as np

    return np.diff(bucket, prepend=-1) != 0
