"""Ingest: from sources to rows in one normal form, with the held-out split drawn before anything else sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ftpipe.canonical import digest
from ftpipe.data.forgotten import forgotten
from ftpipe.data.formats import FormatName, check_fields
from ftpipe.data.reading import BATCH, SHOWN, Reading, read_all
from ftpipe.data.rows import HELDOUT, ROWS, TRAIN, rows_schema
from ftpipe.errors import DataError
from ftpipe.slots import choose
from ftpipe.stages.base import Environment, Stage, StageContext
from ftpipe.tables import connect

if TYPE_CHECKING:
    import duckdb

QUARANTINE = "quarantine.parquet"
FORGOTTEN = "forgotten: named by `ftpipe forget`"


class Heldout(BaseModel):
    """Which rows are kept from training and curation. A group falls on a side by its own hash, so new groups do not move old ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: Literal["group", "row"] = Field(default="group", description="What is drawn: whole groups, or rows (equal rows stay together).")
    share: float = Field(default=0.1, ge=0, lt=1, description="Expected share of the groups or rows that are held out; 0 holds nothing out.")
    limit: int | None = Field(default=None, ge=1, description="Held-out rows to keep; the others are dropped and never trained on.")
    groups: list[str] | None = Field(default=None, min_length=1, description="Hold out exactly these groups, instead of a share.")

    @model_validator(mode="after")
    def _one_way(self) -> Heldout:
        if self.groups and self.by == "row":
            raise ValueError("`groups` needs `by: group`")
        return self

    @property
    def wanted(self) -> bool:
        return bool(self.groups) or self.share > 0


class Ingest(Stage):
    """Reads sources, recognises the format of each row, gives it its ids and its side of the split, and sets aside what cannot be read."""

    produces = "rows"

    source: choose("data/sources") | None = Field(default=None, description="Where the rows come from: one of the sources.")  # type: ignore[valid-type]
    sources: list[choose("data/sources")] = Field(default=[], description="Several sources, read one after the other.")  # type: ignore[valid-type]
    format: Literal["auto"] | FormatName = Field(default="auto", description="Format of the rows; `auto` recognises it row by row from the field names.")
    fields: dict[str, str] = Field(default={}, description="The data's own names for fields of the format, e.g. {prompt: question}.")
    group_by: str | None = Field(default=None, description="Field of the raw row that is its group; without it the source's own, else each text for itself.")
    heldout: Heldout = Field(default=Heldout(), description="Rows kept from training and curation.")
    quarantine_limit: float = Field(default=0.2, ge=0, le=1, description="Share of unreadable rows above which the stage stops.")
    seed: int | None = Field(default=None, ge=0, description="Seed of the held-out draw; the pipeline's by default.")

    @model_validator(mode="after")
    def _some_source(self) -> Ingest:
        if (self.source is None) == (not self.sources):
            raise ValueError("give either `source` or `sources`")
        return self

    def all_sources(self) -> list[Any]:
        return [self.source] if self.source is not None else list(self.sources)

    def check(self, env: Environment, pipeline: dict[str, Stage]) -> None:
        check_fields(self.fields, self.format)
        self.externals(env)

    def externals(self, env: Environment) -> dict[str, Any]:
        gone = forgotten(env.workspace)
        return {f"source {i}" if self.sources else "source": source.identity(env) for i, source in enumerate(self.all_sources(), start=1)} | (
            {"forgotten": digest(gone)} if gone else {})

    def run(self, ctx: StageContext) -> None:
        staged = ctx.work / "staged.parquet"
        read = read_all(self, ctx, staged, ctx.out / QUARANTINE)
        read.judge()
        split = _assign(staged, self.heldout, forgotten(ctx.env.workspace), read, ctx)
        self._report(ctx, read, split)

    def _report(self, ctx: StageContext, read: Reading, split: dict[str, Any]) -> None:
        examples = read.shown()
        summary = {
            "rows": read.good, "quarantined": sum(read.faults.values()), "sources": dict(sorted(read.sources.items())),
            "formats": dict(sorted(read.formats.items())), "reasons": dict(read.faults.most_common()), "examples": examples,
            "warnings": dict(sorted(read.warnings.items())), "split": split,
        }
        (ctx.out / "ingest.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
        ctx.meta |= {"formats": summary["formats"], "split": {side: split[side]["rows"] for side in (TRAIN, HELDOUT)}}
        ctx.log.info("%d rows (%s); train %d, held out %d of %d groups", read.good, ", ".join(f"{n} {f}" for f, n in summary["formats"].items()),
                     split[TRAIN]["rows"], split[HELDOUT]["rows"], split[HELDOUT]["groups"])
        for warning, n in sorted(read.warnings.items()):
            ctx.log.warning("%d rows %s", n, warning)
        for reason, n in read.faults.most_common(SHOWN):
            ctx.log.warning("quarantined %d: %s (first: %s)", n, reason, examples[reason])


def _assign(staged: Path, rule: Heldout, gone: list[str], read: Reading, ctx: StageContext) -> dict[str, Any]:
    """The second pass: row ids, sides and decisions from the whole set, then `rows.parquet` batch by batch in the order of reading."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with connect(ctx.work) as con:
        con.register("gone", pa.table({"content_id": pa.array(gone, pa.string())}))
        con.read_parquet(str(staged), file_row_number=True).create_view("read")
        con.execute("create view staged as select *, content_id in (select content_id from gone) as forgotten from read")
        con.execute("""
            create view verdicts as
            select file_row_number as position, content_id, "group", heldout, forgotten,
                   row_number() over (partition by content_id order by file_row_number) as n,
                   row_number() over (partition by heldout, forgotten order by rank, content_id, file_row_number) as k from staged""")
        verdicts = con.sql("select case when n = 1 then content_id else content_id || '~' || n end as row_id, heldout, k, forgotten from verdicts "
                           "order by position").to_arrow_table()
        drawn, split = _count(con, 2**62), _count(con, rule.limit or 2**62)
        names = con.execute('select distinct "group" from staged where heldout and not forgotten order by 1 limit 200').fetchall()
    _check_split(rule, drawn, read)
    split[HELDOUT] |= {"beyond_limit": drawn[HELDOUT]["rows"] - split[HELDOUT]["rows"],
                       "names": [name for name, in names] if rule.by == "group" and drawn[HELDOUT]["groups"] < read.good / 2 else []}
    beyond = pc.and_(verdicts["heldout"], pc.greater(verdicts["k"], rule.limit or 2**62))
    reason = pc.if_else(verdicts["forgotten"], FORGOTTEN, pc.if_else(beyond, "held out beyond the limit", pa.scalar(None, pa.string())))
    keep = pc.is_null(reason)
    with pq.ParquetFile(staged) as source, pq.ParquetWriter(ctx.out / ROWS, rows_schema(), compression="zstd") as out:
        at = 0
        for batch in source.iter_batches(batch_size=BATCH):
            part, n = verdicts.slice(at, batch.num_rows), batch.num_rows
            columns = {name: batch.column(name) for name in batch.schema.names}
            columns["row_id"] = part["row_id"].combine_chunks()
            columns["split"] = pc.if_else(batch.column("heldout"), HELDOUT, TRAIN)
            table = pa.table([columns[f.name] for f in rows_schema()], schema=rows_schema())
            out.write_table(table.filter(keep.slice(at, n)))
            at += n
    aside = pq.read_table(ctx.out / QUARANTINE, columns=["row_id", "reason"])
    reasons = [*reason.chunks, pa.array([f"quarantined: {r}" for r in aside["reason"].to_pylist()], pa.string())]
    ctx.decide(pa.table({
        "row_id": pa.chunked_array([*verdicts["row_id"].chunks, *aside["row_id"].chunks], pa.string()),
        "kept": pa.chunked_array([*keep.chunks, pa.array([False] * aside.num_rows, pa.bool_())]),
        "reason": pa.chunked_array(reasons),
    }))
    return split


def _count(con: duckdb.DuckDBPyConnection, limit: int) -> dict[str, Any]:
    """Rows and groups of each side, with at most `limit` held-out rows."""
    query = """select count(*), count(distinct "group") from verdicts where heldout = $1 and not forgotten and (not heldout or k <= $2)"""
    return {side: dict(zip(("rows", "groups"), con.execute(query, [side == HELDOUT, limit]).fetchall()[0])) for side in (TRAIN, HELDOUT)}


def _check_split(rule: Heldout, split: dict[str, Any], read: Reading) -> None:
    missing = [g for g in rule.groups or () if g not in read.named_groups]
    if missing:
        raise DataError(f"heldout.groups names {missing[0]!r}, which no row belongs to", remedy="check the spelling and `group_by`")
    unit = "groups" if rule.by == "group" else "rows"
    n = sum(side[unit] for side in split.values())
    if not split[TRAIN]["rows"]:
        raise DataError(f"all {n} {unit} are held out; nothing is left to train on", remedy="lower heldout.share, name fewer heldout.groups, or set `group_by`")
    if rule.wanted and not split[HELDOUT]["rows"]:
        raise DataError(f"none of the {n} {unit} fell to the held-out side (heldout.share is {rule.share:g})",
                        remedy="raise heldout.share, try another seed, name heldout.groups, hold out `by: row`, or set share to 0 to hold nothing out")

