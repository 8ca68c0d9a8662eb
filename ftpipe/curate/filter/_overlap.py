"""Which of many texts overlap a fixed set of target texts, by shared n-grams and by similarity as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftpipe.curate.shingles import BATCH, Sets, Unit, ngrams, ragged, sets, tokens

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

PAIR = 2
"""Tokens in an n-gram of the comparison as a whole."""


class Lookup:
    """From a hash to the targets that hold it: sorted hashes, and for each where its targets stand in `owners`."""

    def __init__(self, hashes: np.ndarray, owners: np.ndarray):
        import numpy as np

        order = np.lexsort((owners, hashes))
        hashes, owners = hashes[order], owners[order]
        fresh = np.concatenate([[True], (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])]) if len(hashes) else np.empty(0, bool)
        hashes, self.owners = hashes[fresh], owners[fresh]
        self.hashes, self.starts, self.counts = np.unique(hashes, return_index=True, return_counts=True)

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which item of `hashes`, target) for each target of each hash that is known."""
        import numpy as np

        if not len(self.hashes):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        which = np.flatnonzero(self.hashes[at] == hashes)
        at = at[which]
        return np.repeat(which, self.counts[at]), self.owners[ragged(self.starts[at], self.counts[at])]


class Target:
    """The texts to keep clear of, numbered from 0. See `Decontaminate` for the two tests."""

    def __init__(self, texts: list[str], *, ngram: int, share: float, shortest: int, jaccard: float, unit: Unit):
        import numpy as np
        import pyarrow as pa

        self.ngram, self.share, self.jaccard, self.unit = ngram, share, jaccard, unit
        hashes, counts = tokens(pa.array(texts, pa.string()), unit)
        grams, many = ngrams(hashes, counts, ngram)
        owners = np.repeat(np.arange(len(texts)), many)
        of_length = np.where(counts >= ngram, ngram, counts)[owners]
        # one table for each length of n-gram: the full one, and the lengths of targets that are shorter
        lengths = [n for n in np.unique(of_length).tolist() if n >= min(shortest, ngram)]
        self.overlaps = {n: Lookup(grams[of_length == n], owners[of_length == n]) for n in lengths}
        self.distinct = np.zeros(len(texts), np.int64)
        for lookup in self.overlaps.values():
            self.distinct += np.bincount(lookup.owners, minlength=len(texts))
        self._pairs([texts[i:i + BATCH] for i in range(0, len(texts), BATCH)])

    def _pairs(self, chunks: list[list[str]]) -> None:
        """Sets of token pairs, and a table of the rarest of each: |A| - ceil(t |A|) + 1 of them, which no set of similarity t can miss all of."""
        import numpy as np
        import pyarrow as pa

        parts = [sets(pa.array(c, pa.string()), PAIR, self.unit) for c in chunks]
        values, sizes = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
        self.values, self.sizes = values, sizes
        owners = np.repeat(np.arange(len(sizes)), sizes)
        _, inverse, frequency = np.unique(values, return_inverse=True, return_counts=True)
        order = np.lexsort((values, frequency[inverse], owners))
        place = np.arange(len(values)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        needed = sizes - np.ceil(self.jaccard * sizes - 1e-9).astype(np.int64) + 1
        rare = order[place < np.repeat(needed, sizes)]
        self.rare = Lookup(values[rare], owners[rare])

    def match(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each text: the target it overlaps most (-1: none), the share of that target's n-grams or the similarity, and whether it was by n-grams."""
        import numpy as np

        n = len(texts)
        hashes, counts = tokens(texts, self.unit)
        text, target, score = [], [], []
        for length, lookup in self.overlaps.items():
            grams, many = self._long(hashes, counts, length)
            which, whom = lookup.find(grams)
            if not len(which):
                continue
            owner = np.repeat(np.arange(n), many)[which]
            shared = np.unique(np.stack([owner, whom, grams[which].view(np.int64)]), axis=1)  # an n-gram that a text repeats counts once
            pair, number = np.unique(shared[:2], axis=1, return_counts=True)
            part = number / self.distinct[pair[1]]
            good = part >= self.share
            text.append(pair[0][good])
            target.append(pair[1][good])
            score.append(part[good])
        best = self._best(n, text, target, score)
        by_overlap = best[0] >= 0
        similar = self._similar(texts, np.flatnonzero(~by_overlap))
        rest = self._best(n, *([s] for s in similar))
        return np.where(by_overlap, best[0], rest[0]), np.where(by_overlap, best[1], rest[1]), by_overlap

    @staticmethod
    def _long(hashes: np.ndarray, counts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """n-grams of the texts that are long enough; none of the others."""
        import numpy as np

        enough = counts >= length
        begins = np.cumsum(counts) - counts
        grams, many = ngrams(hashes[ragged(begins[enough], counts[enough])], counts[enough], length)
        full = np.zeros(len(counts), np.int64)
        full[enough] = many
        return grams, full

    def _similar(self, texts: pa.Array, these: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(text, target, similarity) of the pairs at or above the threshold, among the texts numbered in `these`."""
        import numpy as np
        import pyarrow as pa

        values, sizes = sets(texts.take(pa.array(these)), PAIR, self.unit)
        which, whom = self.rare.find(values)
        text = np.repeat(np.arange(len(these)), sizes)[which]
        text, whom = np.unique(np.stack([text, whom]), axis=1) if len(text) else (text, whom)
        both = Sets(np.concatenate([self.values, values]), _starts(np.concatenate([self.sizes, sizes])), np.concatenate([self.sizes, sizes]))
        j = both.jaccard(whom, text + len(self.sizes), at_least=self.jaccard)
        near = j >= self.jaccard
        return these[text[near]], whom[near], j[near]

    @staticmethod
    def _best(n: int, text: list[np.ndarray], target: list[np.ndarray], score: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The target of the highest score for each of n texts (-1: none), the lowest numbered one of equals, and that score (0)."""
        import numpy as np

        best, value = np.full(n, -1, np.int64), np.zeros(n)
        if text:
            t, w, s = np.concatenate(text).astype(np.int64), np.concatenate(target).astype(np.int64), np.concatenate(score)
            order = np.lexsort((-w, s, t))  # the last of each text is the best
            best[t[order]], value[t[order]] = w[order], s[order]
        return best, value


def _starts(sizes: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.cumsum(sizes) - sizes
