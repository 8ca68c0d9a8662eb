"""Shingles: the set of hashed n-grams of a text, for whole batches of texts at once.

The hash is our own and does not change with library versions. A word is folded from its UTF-8, eight bytes at a time, with the finaliser of
SplitMix64 (Steele, Lea and Flood, 2014); one of more than `LONG` bytes is the first 8 bytes (little endian) of its BLAKE2b. A character is its
code point. An n-gram is a polynomial of its tokens' hashes modulo 2^64, finalised in the same way.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ftpipe.engines.local import parallel

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

Unit = Literal["words", "characters"]
BATCH = 8192
"""Texts in a batch at most: 13 bits for the text and 51 bits for the hash fit one sortable number."""
BITS = 51
LONG = 64
FACTOR = 0x9E3779B97F4A7C15
WIDE_SPACES = ([0xC285, 0xC2A0], [0xE19A80, *range(0xE28080, 0xE2808B), 0xE280A8, 0xE280A9, 0xE280AF, 0xE2819F, 0xE38080])
"""UTF-8 of the white space beyond ASCII (Unicode's, which is that of `str.isspace`), of two and of three bytes."""


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the result depends on every bit of `x` (uint64)."""
    import numpy as np

    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def fold(columns: Iterable[np.ndarray], start: int, n: int) -> np.ndarray:
    """One hash (uint64) for each of n places, of what the columns (n integers each) hold there, one after the other, and of `start`."""
    import numpy as np

    h = np.full(n, start, np.uint64)
    for column in columns:
        h *= np.uint64(FACTOR)
        h += column
    return mix(h)


def tokens(texts: pa.Array, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (uint64) of all words (split at white space) or characters of the lower-cased texts, and how many each text has (int64)."""
    import numpy as np
    import pyarrow.compute as pc

    if unit == "words":
        return _words(texts)
    texts = pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.utf8_lower(texts), r"\s+", " "))
    counts = pc.utf8_length(texts).to_numpy().astype(np.int64)
    points = np.frombuffer("".join(texts.to_pylist()).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return mix(points.astype(np.uint64) + np.uint64(FACTOR)), counts


def _flat(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The UTF-8 of all texts, one after the other, with 8 zero bytes at the end; and where each begins and the last one ends (int64)."""
    import numpy as np
    import pyarrow as pa

    texts = texts.cast(pa.large_string()) if texts.type != pa.large_string() else texts
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset:texts.offset + len(texts) + 1]
    data = np.zeros(int(offsets[-1] - offsets[0]) + 8, np.uint8)
    if texts.buffers()[2] is not None:
        data[:-8] = np.frombuffer(texts.buffers()[2], np.uint8)[offsets[0]:offsets[-1]]
    return data, offsets - offsets[0]


def _words(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """`tokens` for words, on the bytes of all texts at once."""
    import numpy as np
    import pyarrow.compute as pc

    if not len(texts):
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    data, offsets = _flat(texts)
    plain = bool(data.max() < 128)
    if plain:
        data += ((data - np.uint8(65)) < 26).view(np.uint8) << np.uint8(5)
    else:
        data, offsets = _flat(pc.utf8_lower(texts))
    space = _spaces(data, plain)
    starts, ends = _edges(space, offsets)
    counts = np.diff(np.searchsorted(starts, offsets))
    return _hashed(data, starts, ends - starts), counts


def _spaces(data: np.ndarray, plain: bool) -> np.ndarray:
    """Which bytes belong to white space; the padding at the end does."""
    import numpy as np

    space = data == 32
    space |= (data - np.uint8(9)) < 5
    space |= (data - np.uint8(28)) < 4
    space[-8:] = True
    if not plain:
        lead = np.flatnonzero((data == 0xC2) | (data == 0xE1) | (data == 0xE2) | (data == 0xE3))
        two = (data[lead].astype(np.uint32) << np.uint32(8)) | data[lead + 1]
        three = (two << np.uint32(8)) | data[lead + 2]
        for length, code, wide in zip((2, 3), (two, three), WIDE_SPACES):
            found = lead[np.isin(code, wide)]
            for i in range(length):
                space[found + i] = True
    return space


def _edges(space: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each word begins and ends. Texts follow each other without a space: a word never reaches into the next."""
    import numpy as np

    word = ~space[:-8]
    first, last = word.copy(), word.copy()
    first[1:] &= space[:-9]
    last &= space[1:-7]
    filled = offsets[:-1] < offsets[1:]
    begins, finals = offsets[:-1][filled], offsets[1:][filled] - 1
    first[begins], last[finals] = word[begins], word[finals]
    return np.flatnonzero(first), np.flatnonzero(last) + 1


def _hashed(data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Hash (uint64) of each word, `lengths` bytes of `data` from `starts`."""
    import numpy as np

    eight = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))
    masks = np.array([2 ** (8 * i) - 1 for i in range(9)], np.uint64)
    found = lengths.astype(np.uint64) * np.uint64(FACTOR)
    found ^= eight[starts] & masks[np.minimum(lengths, 8)]
    found = mix(found)
    for at in range(8, LONG, 8):
        more = np.flatnonzero((lengths > at) & (lengths <= LONG))
        if not len(more):
            break
        found[more] = mix(found[more] ^ (eight[starts[more] + at] & masks[np.minimum(lengths[more] - at, 8)]))
    for i in np.flatnonzero(lengths > LONG).tolist():
        whole = data[starts[i]:starts[i] + lengths[i]].tobytes()
        found[i] = int.from_bytes(hashlib.blake2b(whole, digest_size=8).digest(), "little")
    return found


def ngrams(hashes: np.ndarray, counts: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all n-grams (in the order of the texts), and how many each text has. A text with fewer than n tokens has one: all of it."""
    import numpy as np

    ends = np.cumsum(counts)
    begins = ends - counts
    many = np.where(counts >= n, counts - n + 1, np.minimum(counts, 1))
    windows = max(len(hashes) - n + 1, 0)
    inside = np.ones(len(hashes), bool)  # whether the n tokens from here on are of one text
    for i in range(1, n):
        inside[ends[counts >= i] - i] = False
    long = fold((hashes[i:i + windows] for i in range(n)), n, windows)[inside[:windows]]
    if len(long) == many.sum():
        return long, many
    out = np.empty(int(many.sum()), np.uint64)
    at = np.cumsum(many) - many
    out[ragged(at[counts >= n], many[counts >= n])] = long
    for length in range(1, n):
        these = np.flatnonzero(counts == length)
        if len(these):
            out[at[these]] = fold((hashes[begins[these] + i] for i in range(length)), length, len(these))
    return out, many


def sets(texts: pa.Array, n: int, unit: Unit = "words") -> tuple[np.ndarray, np.ndarray]:
    """The shingle set of each of at most `BATCH` texts: hashes (uint64 below 2**51, ascending and unique within a text), and set sizes (int64).

    A text with fewer than n tokens has one shingle, the whole text, so that it equals only a text of the same tokens; an empty one has none.
    """
    import numpy as np

    if len(texts) > BATCH:
        raise ValueError(f"{len(texts)} texts in a batch of at most {BATCH}")
    packed, many = ngrams(*tokens(texts, unit), n)
    packed >>= np.uint64(64 - BITS)
    packed |= np.repeat(np.arange(len(many), dtype=np.uint64) << np.uint64(BITS), many)
    packed.sort()
    fresh = np.ones(len(packed), bool)
    np.not_equal(packed[1:], packed[:-1], out=fresh[1:])
    if not fresh.all():
        packed = packed[fresh]
    sizes = np.diff(np.searchsorted(packed, np.arange(len(many), dtype=np.uint64) << np.uint64(BITS)), append=len(packed))
    packed &= np.uint64(2**BITS - 1)
    return packed, sizes.astype(np.int64)


def ragged(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Indices start, start + 1, ..., start + count - 1 for each pair of `starts` and `counts`, one after the other."""
    import numpy as np

    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - counts), counts)


class Sets:
    """Shingle sets of many texts in one flat array.

    values: hashes as `sets` gives them, an array or a file of them, which is read as needed. starts, sizes: (n,) where each text's set begins and how
    large it is.
    """

    def __init__(self, values: np.ndarray | Path, starts: np.ndarray, sizes: np.ndarray):
        import numpy as np

        self.starts, self.sizes, self.map = starts, sizes, None
        if isinstance(values, Path):
            if values.stat().st_size:
                with values.open("rb") as f:
                    self.map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            values = np.frombuffer(self.map or b"", np.uint64)
        self.values = values

    def intersections(self, a: np.ndarray, b: np.ndarray, *, at_once: int = 2**17) -> np.ndarray:
        """Size (int64) of the intersection of the sets of texts a[i] and b[i]; each processor has about `at_once` hashes in memory at a time."""
        import numpy as np

        load = np.cumsum(self.sizes[a] + self.sizes[b])

        def parts() -> Iterator[slice]:
            start = 0
            while start < len(a):
                base = int(load[start - 1]) if start else 0
                end = min(max(int(np.searchsorted(load, base + at_once)), start + 1), start + BATCH, len(a))
                yield slice(start, end)
                start = end

        return np.concatenate([np.empty(0, np.int64), *parallel(lambda part: self._chunk(a[part], b[part]), parts())])

    def _chunk(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        import numpy as np

        pair = np.arange(len(a), dtype=np.uint64) << np.uint64(BITS)
        packed = np.concatenate([np.repeat(pair, self.sizes[i]) | self.values[ragged(self.starts[i], self.sizes[i])] for i in (a, b)])
        if self.map is not None:
            self.map.madvise(mmap.MADV_DONTNEED)  # 64 KB around each set: they stay in the system's cache, but no longer count as this process's
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
