"""MinHash signatures in bands: rows that share a band are candidates for near duplicates.

Broder (1997), "On the resemblance and containment of documents": two sets have the same minimum under a random order of all shingles with a
probability equal to their Jaccard similarity s. With b bands of r minima each, two rows share a band with probability 1 - (1 - s^r)^b.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from ftpipe.curate.shingles import BITS, FACTOR, Sets, Unit, fold, mix, sets
from ftpipe.engines.base import Engine
from ftpipe.engines.local import Local

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

TEXTS = 1024
"""Texts that one thread works on at a time."""
BLOCK = 2**15
"""Shingles whose permuted values are in memory at a time, so that they stay in a processor's own cache."""
AT_ONCE = 2**24
"""Rows whose keys of one band are sorted in memory at a time."""


def recall(similarity: float, bands: int, size: int) -> float:
    """Probability that two rows of this similarity share at least one of `bands` bands of `size` minima."""
    return 1 - (1 - similarity**size) ** bands


def solve(threshold: float, permutations: int, wanted: float) -> tuple[int, int]:
    """(bands, minima in each): the longest bands, hence the fewest false candidates, that find a pair at the threshold with probability `wanted`.

    0.8, 112 and 0.9 give 14 bands of 8. If even bands of one minimum find too little, it is those.
    """
    fitting = [(permutations // r, r) for r in range(1, permutations + 1) if recall(threshold, permutations // r, r) >= wanted]
    return fitting[-1] if fitting else (permutations, 1)


@lru_cache
def constants(n: int) -> tuple[np.ndarray, np.ndarray]:
    """n odd factors and n summands (uint32) of the permutations x -> a x + b mod 2^32, from BLAKE2b over their number."""
    import numpy as np

    raw = b"".join(hashlib.blake2b(f"ftpipe minhash {i}".encode(), digest_size=8).digest() for i in range(n))
    pairs = np.frombuffer(raw, dtype="<u4").reshape(n, 2)
    return pairs[:, 0] | np.uint32(1), pairs[:, 1].copy()


def keys(values: np.ndarray, sizes: np.ndarray, bands: int, size: int) -> np.ndarray:
    """(bands, rows) uint64: the hash of each band of the signatures of rows with the shingle sets `values`, `sizes` (each at least 1).

    Rows of like size lie side by side in a block, a column each, filled up with the row's last shingle, which leaves its minima as they are.
    """
    import numpy as np

    a, b = constants(bands * size)
    x = (values >> np.uint64(BITS - 32)).astype(np.uint32)
    starts, order = np.cumsum(sizes) - sizes, np.argsort(sizes, kind="stable")
    out = np.empty((bands, len(sizes)), np.uint64)
    at = 0
    while at < len(order):
        # every row of the block is filled up to the size of its last one
        width = max(1, int(np.searchsorted(np.arange(1, len(order) - at + 1) * sizes[order[at:]], BLOCK, side="right")))
        rows = order[at:at + width]
        block = x[starts[rows] + np.minimum(np.arange(sizes[rows[-1]])[:, None], sizes[rows] - 1)]
        permuted, least = np.empty_like(block), np.empty((size, len(rows)), np.uint32)
        for band in range(bands):
            for i in range(size):
                np.multiply(block, a[band * size + i], out=permuted)
                permuted += b[band * size + i]
                np.minimum.reduce(permuted, axis=0, out=least[i])
            out[band, rows] = fold(least, band, len(rows))
        at += width
    return out


def signed(batch: pa.RecordBatch, *, ngram: int, unit: Unit, bands: int, size: int) -> tuple[np.ndarray, ...]:
    """Of at most `shingles.BATCH` rows of (rank, text): rank; shingles of all; how many each has; band keys and hash of the whole of those that have any."""
    import numpy as np

    values, sizes = sets(batch["text"], ngram, unit)
    filled = sizes[sizes > 0]
    whole = np.add.reduceat(values, np.cumsum(filled) - filled) if len(filled) else values
    return batch["rank"].to_numpy(), values, sizes, keys(values, filled, bands, size), mix(whole * np.uint64(FACTOR) + filled.astype(np.uint64))


class Index:
    """Shingle sets and band keys of n rows, on disk but for about 30 bytes a row.

    Args:
        folder: for the files `shingles` (8 bytes a shingle) and `band-0`, `band-1`, ... (8 bytes a row each).
        n: rows; they are numbered from 0, by rank.
        engine: where rows are signed and bands are sorted.

    Attributes:
        sizes: (n,) shingles of each row. whole: (n,) uint64, a hash of the whole set; equal for rows of equal sets.
    """

    def __init__(self, folder: Path, n: int, *, ngram: int, unit: Unit, bands: int, size: int, engine: Engine | None = None):
        import numpy as np

        self.folder, self.n, self.ngram, self.unit, self.bands, self.size = folder, n, ngram, unit, bands, size
        self.engine = engine or Local()
        self.starts, self.sizes, self.whole = np.zeros(n, np.int64), np.zeros(n, np.int32), np.zeros(n, np.uint64)
        self.arrived = np.empty(0, np.int64)

    def fill(self, batches: Iterable[pa.RecordBatch], progress: Callable[[int], None] = lambda rows: None) -> Sets:
        """Read batches of (rank, text), in any order, each row once; returns the shingle sets."""
        import numpy as np

        at, done, ranks = 0, 0, []
        parts = (batch.slice(i, TEXTS) for batch in batches for i in range(0, batch.num_rows, TEXTS))
        sign = partial(signed, ngram=self.ngram, unit=self.unit, bands=self.bands, size=self.size)
        files = [(self.folder / f"band-{i}").open("wb") for i in range(self.bands)]
        try:
            with (self.folder / "shingles").open("wb") as out:
                for rank, values, sizes, keys_, whole in self.engine.map(sign, parts):
                    out.write(values)
                    self.sizes[rank], self.starts[rank] = sizes, at + np.cumsum(sizes) - sizes
                    at += len(values)
                    filled = rank[sizes > 0]
                    self.whole[filled] = whole
                    ranks.append(filled)
                    for file, column in zip(files, keys_):
                        file.write(column)
                    done += len(rank)
                    progress(done)
        finally:
            for file in files:
                file.close()
        self.arrived = np.concatenate([self.arrived, *ranks])
        part = self.folder / "index.part.npz"
        np.savez(part, starts=self.starts, sizes=self.sizes, whole=self.whole, arrived=self.arrived)
        part.replace(self.folder / "index.npz")
        return Sets(self.folder / "shingles", self.starts, self.sizes)

    def load(self) -> Sets | None:
        """The shingle sets, if an earlier run with this folder, for the same rows and settings, came to the end of `fill`."""
        import numpy as np

        if not (self.folder / "index.npz").exists():
            return None
        with np.load(self.folder / "index.npz", allow_pickle=False) as saved:
            self.starts, self.sizes, self.whole, self.arrived = (saved[k] for k in ("starts", "sizes", "whole", "arrived"))
        return Sets(self.folder / "shingles", self.starts, self.sizes)

    def buckets(self, these: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Buckets of two or more rows of each band, one band after the other and each in parts: (number of each line's bucket, counted from 0 in each
        part; its row), ascending.

        Args:
            these: (n,) bool, the rows that take part.
        """
        bits, parts = max(self.n - 1, 1).bit_length(), -(-len(self.arrived) // AT_ONCE)
        entries = (self._entries(band, part, parts, these, bits) for band in range(self.bands) for part in range(parts))
        yield from self.engine.map(partial(shared, bits=bits), entries, alone=True)

    def _entries(self, band: int, part: int, parts: int, these: np.ndarray, bits: int) -> np.ndarray:
        """(key << bits | row, uint64) of the rows whose keys of a band are of one part."""
        import numpy as np

        packed = [np.empty(0, np.uint64)]
        with (self.folder / f"band-{band}").open("rb") as file:
            for start in range(0, len(self.arrived), AT_ONCE):
                row = self.arrived[start:start + AT_ONCE]
                key = np.fromfile(file, np.uint64, len(row))
                chosen = these[row]
                if parts > 1:
                    chosen &= key % np.uint64(parts) == part
                # the key's upper bits make room for the row; what they would have told apart the comparison does
                packed.append((key[chosen] << np.uint64(bits)) | row[chosen].astype(np.uint64))
        return np.concatenate(packed)


def shared(packed: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Bucket numbers (from 0) and rows of the entries (key << bits | row) whose key another one has, ascending."""
    import numpy as np

    packed = np.sort(packed)
    key = packed >> np.uint64(bits)
    same = np.zeros(len(key) + 1, bool)
    np.equal(key[1:], key[:-1], out=same[1:-1])  # same[i]: entries i - 1 and i are of one bucket
    lines = np.flatnonzero(same[1:] | same[:-1])
    bucket = np.cumsum(~same[:-1][lines]) - 1
    return bucket, (packed[lines] & np.uint64(2**bits - 1)).astype(np.int64)
