"""Statistics of rows: lengths, sources, formats, openings, exact duplicates, languages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftpipe.curate.step import connection
from ftpipe.curate.text import exact_text, row_text, squeeze
from ftpipe.data.rows import HELDOUT, TRAIN, RowSet

if TYPE_CHECKING:
    from ftpipe.stages.base import StageContext

TOP = 12
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
READ_CHARS = 1000
"""Characters of a row that its language is told by."""


class Description:
    """What there is to say about the rows of one stage; both sides of the split are described, duplicates and openings of the train side."""

    def __init__(self, rows: RowSet, ctx: StageContext):
        self.rows, self.ctx = rows, ctx

    def whole(self, opening: int, languages: int) -> dict[str, Any]:
        """Everything as JSON; also writes `lengths.parquet` (split, and one column of whole numbers for each measure)."""
        import pyarrow.parquet as pq

        with connection(self.rows, self.ctx) as con:
            con.execute(f"create table texts as select row_id, split, source, format, {squeeze(row_text('prompt'))} as prompt, "
                        f"{squeeze(row_text('answer'))} as answer, hash({exact_text()}) as said from rows")
            lengths = self._lengths(con)
            pq.write_table(lengths, self.ctx.out / "lengths.parquet", compression="zstd")
            sides = dict(con.execute("select split, count(*) from texts group by split").fetchall())
            copies = con.execute("select count(*) - count(distinct said) from texts where split = 'train'").fetchone()[0]
            both = con.execute("select count(*) from texts where split = 'heldout' and said in (select said from texts where split = 'train')").fetchone()[0]
            return {"rows": {side: sides.get(side, 0) for side in (TRAIN, HELDOUT)},
                    "duplicates": {"rows": copies, "heldout_in_train": both},
                    "sources": _counts(con, "select source, count(*) from texts group by 1"),
                    "formats": _counts(con, "select format, count(*) from texts group by 1"),
                    "openings": {part: self._openings(con, part, opening) for part in ("prompt", "answer")},
                    "lengths": {name: _quantiles(lengths, name) for name in lengths.column_names if name != "split"},
                    "languages": self._languages(con, languages) if languages else None}

    def _lengths(self, con: Any) -> Any:
        """Tokens where a step has counted them; words of the prompt and of the answer anyway."""
        words = "case when {0} = '' then 0 else length({0}) - length(replace({0}, ' ', '')) + 1 end"
        columns = {"prompt words": words.format("prompt"), "answer words": words.format("answer")}
        for name in ("tokens", "trained_tokens"):
            if (table := self.rows.annotation(name)) is not None:
                con.register(f"counted_{name}", table)
                columns[name.replace("_", " ")] = f"(select any_value({name}) from counted_{name} c where c.row_id = texts.row_id)"
        listed = ", ".join(f'({sql})::bigint as "{name}"' for name, sql in columns.items())
        return con.sql(f"select split, {listed} from texts order by row_id").to_arrow_table()

    @staticmethod
    def _openings(con: Any, part: str, words: int) -> dict[str, Any]:
        """The commonest first words of rows that differ, and how many share theirs with another row."""
        opening = f"lower(array_to_string(string_split({part}, ' ')[1:{words}], ' '))"
        con.execute(f"create or replace temp table opened as select {opening} as opening, count(distinct said) as n from texts "
                    f"where split = 'train' and {part} <> '' group by 1")
        total, shared = con.execute("select coalesce(sum(n), 0), coalesce(sum(n) filter (n > 1), 0) from opened").fetchone()
        return {"rows": int(total), "shared": int(shared), "top": _counts(con, "select opening, n from opened where n > 1")}

    def _languages(self, con: Any, most: int) -> dict[str, Any]:
        """Languages by ISO 639-1 code, of the rows whose ids have the lowest hashes."""
        from collections import Counter

        import py3langid

        texts = con.execute("select left(case when answer = '' then prompt else prompt || ' ' || answer end, $chars) from texts where split = 'train' "
                            "order by md5(row_id) limit $most", {"chars": READ_CHARS, "most": most}).fetchall()
        found: Counter[str] = Counter()
        for i, (text,) in enumerate(texts, start=1):
            found[py3langid.classify(text)[0]] += 1
            if i % 50 == 0 or i == len(texts):
                self.ctx.progress(i, len(texts), "languages")
        return {"sample": len(texts), "top": [{"name": n, "rows": k} for n, k in sorted(found.items(), key=lambda item: (-item[1], item[0]))[:TOP]]}


def _counts(con: Any, sql: str) -> list[dict[str, Any]]:
    """Names and numbers, the largest first."""
    rows = con.execute(f"select * from ({sql}) as t(name, n) order by n desc, name limit {TOP}").fetchall()
    return [{"name": name, "rows": int(n)} for name, n in rows]


def _quantiles(table: Any, name: str) -> dict[str, float]:
    import numpy as np

    values = table[name].drop_null().to_numpy()
    return {f"{q:g}": float(np.quantile(values, q)) for q in QUANTILES} | {"sum": float(values.sum())} if len(values) else {}
