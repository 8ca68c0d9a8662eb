"""Sentences that stand in very many rows, taken out of them."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ftpipe.curate.dedup import _bands, _greedy
from ftpipe.curate.dedup.base import Dedup
from ftpipe.curate.shingles import BATCH
from ftpipe.curate.step import StepContext, connection
from ftpipe.curate.text import Part
from ftpipe.data.rows import TOOLS, RowSet, content_id

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

Piece = Literal["sentences", "lines", "paragraphs"]
PIECES = {"sentences": re.compile(r"""\S[^\n]*?(?:[.!?…]+["'”’)\]]*(?=\s|\Z)|[。！？]+[”’」』）]*|(?=\s*(?:\n|\Z)))"""),
          "lines": re.compile(r"\S(?:[^\n]*\S)?"), "paragraphs": re.compile(r"\S(?:.*?\S)??(?=\s*(?:\n\s*\n|\Z))", re.DOTALL)}
CHANGED, EMPTIED = "repeated sentences removed", "nothing but repeated sentences"
MADE = "made.jsonl"


def form(piece: str) -> str:
    """What two sentences share if they say the same: lower case, white space squeezed."""
    return " ".join(piece.lower().split())


def number(said: str) -> int:
    """64-bit number of a form."""
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "little")


def turns(row: dict[str, Any], part: Part) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the texts of this part of a row stand: (object, key) pairs."""
    if row["format"] == "text":
        yield row, "text"
        return
    pair = {"all": ["messages", "chosen", "rejected"], "prompt": ["messages"], "answer": ["chosen", "rejected"]}[part]
    for column in ["messages"] if row["format"] == "messages" else pair:
        for turn in row[column] or ():
            if turn["role"] != TOOLS and (part == "all" or (turn["role"] == "assistant") == (part == "answer")):
                yield turn, "content"


def without(said: str, spans: list[tuple[int, int]], gone: list[bool]) -> str:
    """The text less the pieces that are gone; of the white space around them the widest stays."""
    out: list[str] = []
    gap, end, first = "", 0, True
    for (start, stop), lost in zip(spans, gone):
        gap, end = max(gap, said[end:start], key=lambda g: (g.count("\n"), len(g))), stop
        if not lost:
            out += [gap if out or first else "", said[start:stop]]
            gap = ""
        first = False
    return "".join(out) + (said[end:] if out and not gone[-1] else "")


class Sentences(Dedup):
    """Removes sentences that stand in more than `most` rows: breadcrumbs, standard openings and closings, quoted passages.

    Sentences of at least `least_words` words are counted by the number of rows that hold them, case and white space aside; those whose pairs of words
    have a Jaccard similarity of `near` or more count as one (found by MinHash, as in `minhash`; the more frequent one stands for the other). A row that
    holds one too frequent is replaced by a new row without it, which names the old one as its parent and comes after the other rows; all other rows stay
    as they are, to the byte.
    A turn of a conversation, or a text, that consists of such sentences alone is left as it is, or its row dropped (`emptied`). With `heldout` and
    `against` the sentences of those rows count too; only train rows lose any. `prefer` says which row is the first one for `keep_one`.

    New rows are kept on disk until they are written; in memory are the too frequent sentences, and a name for each row that changes.
    """

    paper: ClassVar[str] = ("BaichuanSEED: Sharing the Potential of ExtensivE Data Collection and Deduplication by Introducing a Competitive Large Language "
                            "Model Baseline")
    libraries: ClassVar[tuple[str, ...]] = ("duckdb", "pyarrow")
    reason = CHANGED
    names_keepers = False

    part: Part = Field(default="answer", description="Where sentences are counted and removed: in all of a row, its prompt, or its answer.")
    piece: Piece = Field(default="sentences", description="What is counted and removed as a whole.")
    most: int = Field(default=20, ge=1, description="A sentence may stand in so many rows; one that stands in more is removed.")
    share: float = Field(default=0.0, ge=0, le=1, description="It may also stand in this share of all rows.")
    least_words: int = Field(default=4, ge=1, description="Shorter sentences are never removed.")
    near: float | None = Field(default=0.8, gt=0, le=1, description="Similarity from which two sentences count as one; null: only equal ones do.")
    keep_one: bool = Field(default=False, description="The first row that holds such a sentence keeps it.")
    emptied: Literal["keep", "drop"] = Field(default="keep", description="A turn that would be left empty is kept as it is, or its row is dropped.")

    def duplicates(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        with tempfile.TemporaryDirectory(dir=ctx.work) as scratch, connection(rows, ctx) as con:
            n, _ = self.rank(rows, ctx, con)
            self._count(con, Path(scratch), ctx, n)
            limit = max(self.most, int(self.share * n))
            con.execute(f"create table frequent as select piece, count(*) as n, min(rank) as first from held group by piece having count(*) > {limit}")
            con.execute("create table gone as select a.form, f.first from frequent f join alias a on a.piece = f.piece")
            first = dict(con.sql("select form, first from gone").fetchall())
            con.execute("create table touched as select distinct rank from held semi join frequent using (piece)")
            changed = self._change(con, ctx, first)
            top = con.sql("select f.n, s.said from frequent f join said s on s.form = f.piece order by f.n desc, s.said limit 20").fetchall()
            ctx.report({"sentences": con.sql("select count(*) from alias").fetchall()[0][0], "frequent": len(first), "most": limit,
                        "largest": [{"rows": k, "sentence": said} for k, said in top]})
        return changed

    def _pieces(self, row: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, list[tuple[int, int]], list[int | None]]]:
        """For each turn: object and key, spans of its pieces, and the number of each piece's form (None for a short one)."""
        for holder, key in turns(row, self.part):
            spans = [m.span() for m in PIECES[self.piece].finditer(holder[key] or "")]
            said = [form(holder[key][a:b]) for a, b in spans]
            yield holder, key, spans, [number(s) if s.count(" ") + 1 >= self.least_words else None for s in said]

    def _count(self, con: duckdb.DuckDBPyConnection, scratch: Path, ctx: StepContext, n: int) -> None:
        """Tables `held` (piece, rank: which rows hold it), `said` (form, said) and `alias` (form, the piece it counts as)."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema([("form", pa.uint64()), ("said", pa.string()), ("rank", pa.int64())])
        done = 0
        with pq.ParquetWriter(scratch / "pieces.parquet", schema, compression="zstd") as out:
            batches = con.sql("select rank, format, messages, chosen, rejected, text from compared").to_arrow_reader(BATCH)
            for rows, lines in ctx.env.engine.map(_held, batches, common=(self,), alone=True):
                out.write_table(pa.table([[k[0] for k in lines], list(lines.values()), [k[1] for k in lines]], schema=schema))
                done += rows
                ctx.progress(done, n, "rows")
        pieces = f"read_parquet('{scratch / 'pieces.parquet'}')"
        con.execute(f"create table said as select form, any_value(said) as said, count(*) as n from {pieces} group by form")
        con.execute("create table alias as select form, form as piece from said")
        if self.near is not None:
            self._join_near(con, scratch, ctx)
        con.execute(f"create table held as select distinct piece, rank from {pieces} join alias using (form)")

    def _join_near(self, con: duckdb.DuckDBPyConnection, scratch: Path, ctx: StepContext) -> None:
        """Let each form that is near a more frequent one count as that."""
        import pyarrow as pa

        con.execute("create table ordered as select form, said, row_number() over (order by n desc, form) - 1 as rank from said")
        forms = con.sql("select form from ordered order by rank").to_arrow_table()["form"]
        bands, size = _bands.solve(self.near, 112, 0.9)
        index = _bands.Index(scratch, len(forms), ngram=2, unit="words", bands=bands, size=size, engine=ctx.env.engine)
        sets = index.fill(con.sql("select rank, said as text from ordered").to_arrow_reader(BATCH))
        lost, keeper, _ = _greedy.Search(index, sets, self.near, leaders=16, scratch=scratch).run()
        con.register("near", pa.table({"form": forms.take(pa.array(lost)), "piece": forms.take(pa.array(keeper))}))
        con.execute("create or replace table alias as select form, coalesce(near.piece, form) as piece from said left join near using (form)")
        con.unregister("near")

    def _change(self, con: duckdb.DuckDBPyConnection, ctx: StepContext, first: dict[int, int]) -> pa.Table:
        """Verdicts on the rows that lose sentences; what replaces them goes to the work folder."""
        import pyarrow as pa

        verdicts: dict[str, tuple[str | None, str, float]] = {}
        with (ctx.work / MADE).open("w", encoding="utf-8") as out:
            reader = con.sql("""select row_id, rank, format, messages, chosen, rejected, text, "group" from compared semi join touched using (rank)
                                where origin = 0 order by rank""").to_arrow_reader(BATCH)
            for batch in reader:
                for row in batch.to_pylist():
                    row_id, rank = row.pop("row_id"), row.pop("rank")
                    kept = self._rewrite(row, rank, first)
                    if kept is None:
                        verdicts[row_id] = (None, EMPTIED, 0.0)
                    elif kept < 1:
                        said = content_id(row)
                        verdicts[row_id] = (said, CHANGED, kept)
                        out.write(json.dumps(row | {"parents": [row_id], "content_id": said}, ensure_ascii=False) + "\n")
        self._spare(con, ctx, verdicts)
        columns = list(zip(*verdicts.values())) or [(), (), ()]
        return pa.table({"row_id": pa.array(list(verdicts), pa.string()), "keeper": pa.array(columns[0], pa.string()),
                         "reason": pa.array(columns[1], pa.string()), "score": pa.array(columns[2], pa.float64())})

    def _rewrite(self, row: dict[str, Any], rank: int, first: dict[int, int]) -> float | None:
        """Remove the sentences from a row in place; the share of its characters that is left, or None if the row is to be dropped."""
        before = after = 0
        for holder, key, spans, numbers in self._pieces(row):
            said = holder[key] or ""
            gone = [number in first and not (self.keep_one and first[number] == rank) for number in numbers]
            left = without(said, spans, gone) if any(gone) else said
            if all(gone) and gone:
                if self.emptied == "drop":
                    return None
                left = said
            before, after = before + len(said), after + len(left)
            holder[key] = left
        return after / before if before else 1.0

    def _spare(self, con: duckdb.DuckDBPyConnection, ctx: StepContext, verdicts: dict[str, tuple[str | None, str, float]]) -> None:
        """Leave rows as they are whose new text some row had that an earlier step dropped: no new row can be made of it, and the old one would be lost."""
        import pyarrow as pa

        fresh = {row_id: said for row_id, (said, _, _) in verdicts.items() if said}
        con.register("fresh", pa.table({"row_id": pa.array(list(fresh), pa.string()), "content_id": pa.array(list(fresh.values()), pa.string())}))
        spared = con.sql("""select row_id from fresh semi join rows_full using (content_id)
                            anti join (select content_id from rows where split = 'train') using (content_id)""").fetchall()
        con.unregister("fresh")
        lost = {row_id for row_id, in spared}
        for row_id in lost:
            del verdicts[row_id]
        if lost:
            with (ctx.work / MADE).open(encoding="utf-8") as given, (ctx.work / (MADE + ".part")).open("w", encoding="utf-8") as out:
                out.writelines(line for line in given if json.loads(line)["parents"][0] not in lost)
            (ctx.work / (MADE + ".part")).replace(ctx.work / MADE)

    def replacements(self, rows: RowSet, ctx: StepContext) -> Iterable[dict[str, Any]]:
        with (ctx.work / MADE).open(encoding="utf-8") as given:
            for line in given:
                yield json.loads(line)


def _held(batch: pa.RecordBatch, step: Sentences) -> tuple[int, dict[tuple[int, int], str]]:
    """How many rows there are, and their sentences: by the number of its form and the row's rank, the form."""
    lines: dict[tuple[int, int], str] = {}
    for row in batch.to_pylist():
        for holder, key, spans, numbers in step._pieces(row):
            lines |= {(number, row["rank"]): form(holder[key][a:b]) for (a, b), number in zip(spans, numbers) if number is not None}
    return batch.num_rows, lines
