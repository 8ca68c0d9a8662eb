"""Train rows that give away held-out rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ftpipe.curate.filter._overlap import Target
from ftpipe.curate.filter.base import Filter
from ftpipe.curate.shingles import BATCH, Unit
from ftpipe.curate.step import StepContext, connection
from ftpipe.curate.text import Part, row_text
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError
from ftpipe.stages.base import Ref

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


class Decontaminate(Filter):
    r"""Drops train rows that overlap held-out rows, and names the held-out row.

    Texts are compared in lower case, in Unicode normal form C, with punctuation and symbols taken for white space. A row is dropped

    * if it shares an n-gram with a held-out row (GPT-3, appendix C, uses 13 words), or at least `share` of the held-out row's n-grams. A
      held-out row of fewer words (but at least `shortest`) counts as one n-gram: a train row must contain it whole, words in a row;
    * or if the Jaccard similarity of their word pairs is at least `jaccard`: this finds short rows with a word changed. It is exact: every
      pair at or above the threshold is found.

    Rows are read in batches; the held-out rows' n-grams are held in memory (8 bytes each, and as much for the second test).
    """

    libraries = ("duckdb", "pyarrow")

    ngram: int = Field(default=13, ge=2, description="Words in an n-gram that must not be shared.")
    share: float = Field(default=0.0, ge=0, le=1, description="Least share of a held-out row's n-grams that a row must hold to be dropped; 0: any one.")
    shortest: int = Field(default=5, ge=1, description="Held-out rows of fewer words are looked for only by their similarity as a whole.")
    jaccard: float = Field(default=0.6, gt=0, le=1, description="Similarity (Jaccard, of word pairs) from which a row is dropped.")
    unit: Unit = Field(default="words", description="What n-grams are made of; characters for languages written without spaces.")
    part: Part = Field(default="all", description="What is compared: all of a row, its prompt, or its answer.")
    against: list[Ref] = Field(default_factory=list, description="Further stages to keep clear of: their held-out rows, or all rows where none is held out.")

    def judge(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        ids, target = self._target(rows, ctx)
        found = list(ctx.env.engine.map(_matched, self._texts(rows, ctx, "train"), common=(target,), alone=True))
        row_id = pa.concat_arrays([f[0] for f in found]) if found else pa.array([], pa.string())
        match, score, overlap = (np.concatenate([f[i] for f in found]) if found else np.empty(0) for i in (1, 2, 3))
        hit = match >= 0
        reason = np.where(hit, np.where(overlap, "shares an n-gram with a held-out row", "like a held-out row"), None)
        table = pa.table({"row_id": row_id, "kept": pa.array(~hit), "score": pa.array(score), "reason": pa.array(reason, pa.string()),
                          "keeper": pa.array([ids[i] if i >= 0 else None for i in match.tolist()], pa.string())})
        hits = {i for i in match.tolist() if i >= 0}
        ctx.report({"held_out": len(ids), "held_out_matched": len(hits), "dropped": int(hit.sum()), "by_overlap": int((hit & overlap.astype(bool)).sum())})
        return table

    def _target(self, rows: RowSet, ctx: StepContext) -> tuple[list[str], Target]:
        """Row ids of everything to keep clear of, ascending, and its index."""
        said: dict[str, str] = {}
        for i, other in enumerate([rows, *(RowSet(ctx.inputs[ref]) for ref in self.against)]):
            split = "heldout" if i == 0 or other.count("heldout") else "train"
            for batch in self._texts(other, ctx, split):
                said.update(zip(batch["row_id"].to_pylist(), batch["text"].to_pylist()))
        if not said:
            raise DataError("there is nothing to keep clear of: no row is held out", where=ctx.name,
                            remedy="hold rows out in the ingest stage, or name other stages in `against`")
        ids = sorted(said)
        return ids, Target([said[i] for i in ids], ngram=self.ngram, share=self.share, shortest=self.shortest, jaccard=self.jaccard, unit=self.unit)

    def _texts(self, rows: RowSet, ctx: StepContext, split: str):
        text = rf"regexp_replace(nfc_normalize({row_text(self.part)}), '[\p{{P}}\p{{S}}]+', ' ', 'g')"
        with connection(rows, ctx) as con:
            for batch in con.sql(f"select row_id, {text} as text from rows where split = '{split}'").to_arrow_reader(BATCH):
                for start in range(0, batch.num_rows, BATCH):
                    yield batch.slice(start, BATCH)


def _matched(batch: pa.RecordBatch, target: Target) -> tuple[pa.Array, np.ndarray, np.ndarray, np.ndarray]:
    """Row ids, and for each row what `Target.match` says."""
    return batch["row_id"], *target.match(batch["text"])
