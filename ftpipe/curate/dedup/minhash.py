"""Near duplicates, by MinHash and bands, with the true similarity of every candidate."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from ftpipe.curate.dedup import _bands, _greedy
from ftpipe.curate.dedup.base import Dedup
from ftpipe.curate.shingles import BATCH, Unit
from ftpipe.curate.step import StepContext, connection
from ftpipe.curate.text import row_text
from ftpipe.data.rows import RowSet

if TYPE_CHECKING:
    import pyarrow as pa


class Minhash(Dedup):
    """Drops rows whose n-grams are nearly those of a row that stays.

    The similarity of two rows is the Jaccard similarity of the sets of their n-grams (lower case, split at white space). Candidates are rows
    that share a band of MinHash signatures; each is then compared in full, so that a dropped row really is at least `threshold` like the keeper
    it names (up to hash collisions of 51 bits). A pair just at the threshold is a candidate with probability `recall`, a more similar one with
    a higher one. Rows with fewer words than an n-gram are duplicates only of rows with the same words. What is kept depends neither on the
    order of the rows nor on threads or files.

    Cost: about 8 bytes on disk for each n-gram and 8 for each row and band, below the stage's work folder; in memory about 70 for each row, and at
    most some hundred megabytes for what is being read and compared. A run that was killed while it searched does not sign the rows again.
    """

    libraries = ("pyarrow",)  # its lower case and white space
    reason = "near duplicate"

    threshold: float = Field(default=0.8, gt=0, le=1, description="Jaccard similarity from which two rows are duplicates.")
    ngram: int = Field(default=5, ge=1, description="Words (or characters) in an n-gram.")
    unit: Unit = Field(default="words", description="What n-grams are made of; characters for languages written without spaces.")
    permutations: int = Field(default=112, ge=1, le=4096, description="Length of the signatures; divided into bands to suit threshold and recall.")
    recall: float = Field(default=0.97, gt=0, lt=1, description="Least probability that a pair at the threshold is found.")
    bands: int | None = Field(default=None, ge=1, description="Number of bands, instead of the solved one; together with `band_size`.")
    band_size: int | None = Field(default=None, ge=1, description="Minima in a band, instead of the solved number.")
    leaders: int = Field(default=16, ge=1, le=65_535, description="Rows of a bucket that its others are compared with, at most; bounds the cost of "
                         "false candidates.")

    @model_validator(mode="after")
    def _both(self) -> Minhash:
        if (self.bands is None) != (self.band_size is None):
            raise ValueError("set both of bands and band_size, or neither")
        return self

    def shape(self) -> tuple[int, int]:
        """(bands, minima in each)."""
        return (self.bands, self.band_size) if self.bands and self.band_size else _bands.solve(self.threshold, self.permutations, self.recall)

    def duplicates(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        bands, size = self.shape()
        scratch = ctx.work / "signatures"
        scratch.mkdir(exist_ok=True)
        with connection(rows, ctx) as con:
            began = time.monotonic()
            n, fixed = self.rank(rows, ctx, con)
            index = _bands.Index(scratch, n, ngram=self.ngram, unit=self.unit, bands=bands, size=size, engine=ctx.env.engine)
            shingles = index.load()
            if shingles is None:
                con.execute("set preserve_insertion_order = false")  # rows are numbered, and come in any order with less memory
                texts = con.sql(f"select rank, {row_text(self.part)} as text from compared").to_arrow_reader(BATCH)
                shingles = index.fill(texts, progress=lambda done: ctx.progress(done, n, "rows"))
                con.execute("set preserve_insertion_order = true")
            signed = time.monotonic()
            search = _greedy.Search(index, shingles, self.threshold, self.leaders, scratch, fixed=fixed,
                                    progress=lambda share: ctx.progress(share, 1.0, "decided"))
            dropped, keepers, similarity = search.run()
            done = time.monotonic()
            found = self.found(con, dropped, keepers, similarity)
            largest = {"ranks": [first for first, _ in search.largest]}
            named = dict(con.execute("select rank, row_id from ranked where list_contains($ranks, rank)", largest).fetchall())
        shutil.rmtree(scratch)
        ctx.notes |= {"seconds_signatures": round(signed - began, 3), "seconds_search": round(done - signed, 3),
                      "signatures_per_second": round(n / (signed - began))}
        ctx.report({"bands": bands, "band_size": size, "recall_at_threshold": _bands.recall(self.threshold, bands, size), "compared": search.compared,
                    "equal": search.equal, "rounds": search.rounds, "given_up": search.given_up,
                    "largest_buckets": [{"rows": k, "row_id": named[first]} for first, k in search.largest]})
        ctx.log.info("%d bands of %d; %d comparisons in %d rounds; %d near duplicates, %d of them equal", bands, size, search.compared, search.rounds,
                     len(dropped), search.equal)
        return found
