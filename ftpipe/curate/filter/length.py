"""Bounds on the length of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from ftpipe.curate.filter.base import Filter
from ftpipe.curate.step import StepContext, connection
from ftpipe.curate.text import Part, row_text, squeeze
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


class Length(Filter):
    """Drops rows that are shorter than `least` or longer than `most`, both included in what is kept.

    Length is an annotation of an earlier step (the label audit's `tokens`, `prompt_tokens`, `trained_tokens`), or `characters` or `words` of
    the text itself, white space runs counted as one character. A row whose annotation is unknown is an error, not a guess.
    """

    libraries = ("duckdb",)

    by: str = Field(default="tokens", description="Annotation to measure by, or `characters` or `words` of the text.")
    least: int | None = Field(default=None, ge=0, description="Shortest row that is kept.")
    most: int | None = Field(default=None, ge=0, description="Longest row that is kept.")
    part: Part = Field(default="all", description="For characters and words: all of the row, its prompt, or its answer.")

    @model_validator(mode="after")
    def _bounds(self) -> Length:
        if self.least is None and self.most is None:
            raise ValueError("set least, most or both")
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ValueError(f"least ({self.least}) is above most ({self.most})")
        return self

    def judge(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        text = squeeze(row_text(self.part))
        measures = {"characters": f"length({text})", "words": f"case when {text} = '' then 0 else length({text}) - length(replace({text}, ' ', '')) + 1 end"}
        with connection(rows, ctx) as con:
            if self.by in measures:
                source, length = "rows", measures[self.by]
            else:
                table = rows.annotation(self.by)
                if table is None:
                    raise DataError(f"no step before this one annotates {self.by!r}", where=f"{ctx.name} (length.by)",
                                    remedy="put a label_audit stage before it, or measure by characters or words")
                con.register("measured", table)
                source, length = "rows left join measured using (row_id)", f'"{self.by}"'
            con.execute(f"create table lengths as select row_id, ({length})::double as score from {source} where split = 'train'")
            unknown = con.sql("select row_id from lengths where score is null order by row_id limit 1").fetchall()
            if unknown:
                raise DataError(f"row {unknown[0][0]} has no {self.by}", where=f"{ctx.name} (length.by)")
            least, most = self.least if self.least is not None else 0, self.most if self.most is not None else "'infinity'::double"
            return con.sql(f"""select row_id, score between {least} and {most} as kept, score,
                               case when score < {least} then 'too short' when score > {most} then 'too long' end as reason
                               from lengths order by row_id""").to_arrow_table()
