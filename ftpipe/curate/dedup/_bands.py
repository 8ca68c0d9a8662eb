"""MinHash signatures in bands: rows that share a band are candidates for near duplicates.

Broder (1997), "On the resemblance and containment of documents": two sets have the same minimum under a random order of all shingles with a
probability equal to their Jaccard similarity s. With b bands of r minima each, two rows share a band with probability 1 - (1 - s^r)^b.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from ftpipe.curate.shingles import BATCH, BITS, Sets, Unit, mix, sets

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


def recall(similarity: float, bands: int, size: int) -> float:
    """Probability that two rows of this similarity share at least one of `bands` bands of `size` minima."""
    return 1 - (1 - similarity**size) ** bands


def solve(threshold: float, permutations: int, wanted: float) -> tuple[int, int]:
    """(bands, minima in each): the longest bands, hence the fewest false candidates, that find a pair at the threshold with probability `wanted`.

    0.8, 112 and 0.9 give 14 bands of 8. If even bands of one minimum find too little, it is those.
    """
    fitting = [(permutations // r, r) for r in range(1, permutations + 1) if recall(threshold, permutations // r, r) >= wanted]
    return fitting[-1] if fitting else (permutations, 1)


def constants(n: int) -> tuple[np.ndarray, np.ndarray]:
    """n odd factors and n summands (uint32) of the permutations x -> a x + b mod 2^32, from BLAKE2b over their number."""
    import numpy as np

    raw = b"".join(hashlib.blake2b(f"ftpipe minhash {i}".encode(), digest_size=8).digest() for i in range(n))
    pairs = np.frombuffer(raw, dtype="<u4").reshape(n, 2)
    return pairs[:, 0] | np.uint32(1), pairs[:, 1].copy()


def keys(values: np.ndarray, sizes: np.ndarray, bands: int, size: int) -> np.ndarray:
    """(bands, rows) uint64: the hash of each band of the signatures of rows with the shingle sets `values`, `sizes` (each at least 1)."""
    import numpy as np

    a, b = constants(bands * size)
    x = (values >> np.uint64(BITS - 32)).astype(np.uint32)
    starts = np.cumsum(sizes) - sizes
    out = np.empty((bands, len(sizes)), np.uint64)
    for band in range(bands):
        key = np.full(len(sizes), band, np.uint64)
        for i in range(band * size, (band + 1) * size):
            key = mix(key * np.uint64(0x9E3779B97F4A7C15) + np.minimum.reduceat(x * a[i] + b[i], starts).astype(np.uint64))
        out[band] = key
    return out


class Index:
    """Shingle sets and band keys of n rows, in two files that are mapped into memory.

    Args:
        folder: for the files `shingles` (8 bytes a shingle) and `bands` (8 bytes a row and band), read one band at a time.
        n: rows; they are numbered from 0.
    """

    def __init__(self, folder: Path, n: int, *, ngram: int, unit: Unit, bands: int, size: int):
        import numpy as np

        self.folder, self.n, self.ngram, self.unit, self.bands, self.size = folder, n, ngram, unit, bands, size
        self.keys = np.memmap(folder / "bands", np.uint64, "w+", shape=(bands, max(n, 1)))
        self.starts, self.sizes = np.zeros(n, np.int64), np.zeros(n, np.int64)

    def fill(self, batches: Iterable[pa.RecordBatch]) -> Sets:
        """Read batches of (rank, text), in any order, each row once; returns the shingle sets."""
        import numpy as np

        at = 0
        with (self.folder / "shingles").open("wb") as out:
            parts = (batch.slice(i, BATCH) for batch in batches for i in range(0, batch.num_rows, BATCH))
            for rank, values, sizes, keys_ in _parallel(self._batch, parts):
                out.write(values.tobytes())
                self.sizes[rank], self.starts[rank] = sizes, at + np.cumsum(sizes) - sizes
                at += len(values)
                if keys_.shape[1]:
                    self.keys[:, rank[sizes > 0]] = keys_
        values = np.memmap(self.folder / "shingles", np.uint64, "r") if at else np.empty(0, np.uint64)
        return Sets(values, self.starts, self.sizes)

    def _batch(self, batch: pa.RecordBatch) -> tuple[np.ndarray, ...]:
        values, sizes = sets(batch["text"], self.ngram, self.unit)
        return batch["rank"].to_numpy(), values, sizes, keys(values, sizes[sizes > 0], self.bands, self.size)


def _parallel(work, items: Iterable) -> Iterator:
    """`map(work, items)` on all processors, with a bounded number of results waiting. numpy and Arrow release the interpreter's lock."""
    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
