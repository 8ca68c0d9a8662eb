"""Shingles: the set of hashed n-grams of a text, for whole batches of texts at once.

The hash is our own and does not change with library versions: a word is the first 8 bytes (little endian) of BLAKE2b over its UTF-8, a
character its code point; an n-gram folds its words one after the other with the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

Unit = Literal["words", "characters"]
BATCH = 8192
"""Texts in a batch at most: 13 bits for the text and 51 bits for the hash fit one sortable number."""
BITS = 51


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the result depends on every bit of `x` (uint64)."""
    import numpy as np

    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def tokens(texts: pa.Array, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (uint64) of all words (split at white space) or characters of the lower-cased texts, and how many each text has (int64)."""
    import numpy as np
    import pyarrow.compute as pc

    texts = pc.utf8_lower(texts)
    if unit == "words":
        split = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(texts))
        words = split.flatten().dictionary_encode()
        counts = np.diff(split.offsets.to_numpy().astype(np.int64))
        raw = b"".join(hashlib.blake2b(w.encode(), digest_size=8).digest() for w in words.dictionary.to_pylist())
        hashes = np.frombuffer(raw, dtype="<u8")[words.indices.to_numpy()] if len(words) else np.empty(0, np.uint64)
        empty = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0).to_numpy(zero_copy_only=False)
        if empty.any():  # splitting an empty text gives one empty word
            hashes = hashes[~np.repeat(empty & (counts > 0), counts)]
            counts = np.where(empty, 0, counts)
        return hashes.astype(np.uint64), counts
    texts = pc.utf8_trim_whitespace(pc.replace_substring_regex(texts, r"\s+", " "))
    counts = pc.utf8_length(texts).to_numpy().astype(np.int64)
    points = np.frombuffer("".join(texts.to_pylist()).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return mix(points.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)), counts


def fold(hashes: np.ndarray, starts: np.ndarray, n: int) -> np.ndarray:
    """Hash (uint64) of the n consecutive tokens from each of `starts`."""
    import numpy as np

    h = np.full(len(starts), n, np.uint64)
    for i in range(n):
        h = mix(h * np.uint64(0x9E3779B97F4A7C15) + hashes[starts + i])
    return h


def ngrams(hashes: np.ndarray, counts: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all n-grams (in the order of the texts), and how many each text has. A text with fewer than n tokens has one: all of it."""
    import numpy as np

    begins = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64) if len(counts) else np.empty(0, np.int64)
    short = (counts > 0) & (counts < n)
    many = np.where(short, 1, np.maximum(counts - n + 1, 0))
    out = np.empty(int(many.sum()), np.uint64)
    at = np.cumsum(many) - many
    long = counts >= n
    starts = ragged(begins[long], many[long])
    out[ragged(at[long], many[long])] = fold(hashes, starts, n)
    for length in range(1, n):
        these = counts == length
        if these.any():
            out[at[these]] = fold(hashes, begins[these], length)
    return out, many


def sets(texts: pa.Array, n: int, unit: Unit = "words") -> tuple[np.ndarray, np.ndarray]:
    """The shingle set of each of at most `BATCH` texts: hashes (uint64 below 2**51, ascending and unique within a text), and set sizes (int64).

    A text with fewer than n tokens has one shingle, the whole text, so that it equals only a text of the same tokens; an empty one has none.
    """
    import numpy as np

    if len(texts) > BATCH:
        raise ValueError(f"{len(texts)} texts in a batch of at most {BATCH}")
    found, many = ngrams(*tokens(texts, unit), n)
    owner = np.repeat(np.arange(len(many), dtype=np.uint64), many)
    packed = np.sort((owner << np.uint64(BITS)) | (found >> np.uint64(64 - BITS)))
    packed = packed[np.concatenate([[True], packed[1:] != packed[:-1]])] if len(packed) else packed
    sizes = np.bincount((packed >> np.uint64(BITS)).astype(np.int64), minlength=len(many)).astype(np.int64)
    return packed & np.uint64(2**BITS - 1), sizes


def ragged(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Indices start, start + 1, ..., start + count - 1 for each pair of `starts` and `counts`, one after the other."""
    import numpy as np

    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - counts), counts)


class Sets:
    """Shingle sets of many texts in one flat array (in memory or mapped from a file).

    values: hashes as `sets` gives them. starts, sizes: (n,) where each text's set begins and how large it is.
    """

    def __init__(self, values: np.ndarray, starts: np.ndarray, sizes: np.ndarray):
        self.values, self.starts, self.sizes = values, starts, sizes

    def intersections(self, a: np.ndarray, b: np.ndarray, *, at_once: int = 2**21) -> np.ndarray:
        """Size (int64) of the intersection of the sets of texts a[i] and b[i]; about `at_once` hashes are in memory at a time."""
        import numpy as np

        result = np.zeros(len(a), np.int64)
        load = np.cumsum(self.sizes[a] + self.sizes[b])
        start = 0
        while start < len(a):
            base = int(load[start - 1]) if start else 0
            end = min(max(int(np.searchsorted(load, base + at_once)), start + 1), start + BATCH, len(a))
            result[start:end] = self._chunk(a[start:end], b[start:end])
            start = end
        return result

    def _chunk(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        import numpy as np

        pair = np.arange(len(a), dtype=np.uint64)
        packed = np.concatenate([(np.repeat(pair, self.sizes[i]) << np.uint64(BITS)) | self.values[ragged(self.starts[i], self.sizes[i])] for i in (a, b)])
        packed.sort()
        twice = packed[1:][packed[1:] == packed[:-1]]
        return np.bincount((twice >> np.uint64(BITS)).astype(np.int64), minlength=len(a))

    def jaccard(self, a: np.ndarray, b: np.ndarray, *, at_least: float = 0.0) -> np.ndarray:
        """Jaccard similarity (float64) of the sets of a[i] and b[i]; 0 where the sizes alone show that it is below `at_least`."""
        import numpy as np

        small, large = np.minimum(self.sizes[a], self.sizes[b]), np.maximum(self.sizes[a], self.sizes[b])
        possible = np.flatnonzero((small > 0) & (small >= at_least * large))
        result = np.zeros(len(a))
        shared = self.intersections(a[possible], b[possible])
        result[possible] = shared / (small[possible] + large[possible] - shared)
        return result
