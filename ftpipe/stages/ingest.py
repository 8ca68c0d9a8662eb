"""Ingest: from sources to rows in one normal form, with the held-out split drawn before anything else sees them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ftpipe.canonical import digest
from ftpipe.data.forgotten import forgotten
from ftpipe.data.formats import FormatError, FormatName, check_fields, convert, plain
from ftpipe.data.rows import HELDOUT, ROWS, TRAIN, content_id, rows_schema
from ftpipe.errors import DataError
from ftpipe.slots import choose
from ftpipe.stages.base import Environment, Stage, StageContext
from ftpipe.tables import connect

if TYPE_CHECKING:
    import duckdb

QUARANTINE = "quarantine.parquet"
BATCH = 2000
"""Rows held in memory at a time."""
SHOWN = 5
"""Reasons that an error or the log names."""
UNSEEN_TOOLS = "have `tools`, which are kept as meta and not shown to the model"
FORGOTTEN = "forgotten: named by `ftpipe forget`"
MARKED_BAD = "have `label: false`, an answer marked as bad, and are taken like the others"


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

    def _sources(self) -> list[Any]:
        return [self.source] if self.source is not None else list(self.sources)

    def check(self, env: Environment, pipeline: dict[str, Stage]) -> None:
        check_fields(self.fields, self.format)
        self.externals(env)

    def externals(self, env: Environment) -> dict[str, Any]:
        gone = forgotten(env.workspace)
        return {f"source {i}" if self.sources else "source": source.identity(env) for i, source in enumerate(self._sources(), start=1)} | (
            {"forgotten": digest(gone)} if gone else {})

    def run(self, ctx: StageContext) -> None:
        staged = ctx.work / "staged.parquet"
        read = Reading(self)
        read.write(chain.from_iterable(s.records(ctx.env) for s in self._sources()), staged, ctx)
        read.judge()
        split = _assign(staged, self.heldout, forgotten(ctx.env.workspace), read, ctx)
        self._report(ctx, read, split)

    def _report(self, ctx: StageContext, read: Reading, split: dict[str, Any]) -> None:
        summary = {
            "rows": read.good, "quarantined": sum(read.faults.values()), "sources": dict(sorted(read.sources.items())),
            "formats": dict(sorted(read.formats.items())), "reasons": dict(read.faults.most_common()), "examples": read.examples,
            "warnings": dict(sorted(read.warnings.items())), "split": split,
        }
        (ctx.out / "ingest.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
        ctx.meta |= {"formats": summary["formats"], "split": {side: split[side]["rows"] for side in (TRAIN, HELDOUT)}}
        ctx.log.info("%d rows (%s); train %d, held out %d of %d groups", read.good, ", ".join(f"{n} {f}" for f, n in summary["formats"].items()),
                     split[TRAIN]["rows"], split[HELDOUT]["rows"], split[HELDOUT]["groups"])
        for warning, n in sorted(read.warnings.items()):
            ctx.log.warning("%d rows %s", n, warning)
        for reason, n in read.faults.most_common(SHOWN):
            ctx.log.warning("quarantined %d: %s (first: %s)", n, reason, read.examples[reason])


class Reading:
    """The first pass: records become rows of a staging table, or of the quarantine."""

    def __init__(self, stage: Ingest):
        self.stage, self.seed = stage, stage.seed or 0
        self.good = 0
        self.sources: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.named_groups: set[str] = set()

    def write(self, records: Iterator[Any], staged: Path, ctx: StageContext) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema, aside_schema = self.staging_schema(), self.aside_schema()
        with pq.ParquetWriter(staged, schema, compression="zstd") as rows, pq.ParquetWriter(ctx.out / QUARANTINE, aside_schema, compression="zstd") as aside:
            good, bad = [], []
            for record in records:
                row = self.row(record)
                (bad if "reason" in row else good).append(row)
                if len(good) >= BATCH:
                    rows.write_table(pa.Table.from_pylist(good, schema))
                    good = []
                    ctx.progress(self.good, None, "rows")
                if len(bad) >= BATCH:
                    aside.write_table(pa.Table.from_pylist(bad, aside_schema))
                    bad = []
                    if not self.good:
                        break  # not one of the first thousands could be read: no need to read the rest to say so
            rows.write_table(pa.Table.from_pylist(good, schema))
            aside.write_table(pa.Table.from_pylist(bad, aside_schema))

    @staticmethod
    def staging_schema():
        """A row without its id and side, and what decides them: `heldout`, and `rank`, the order in which held-out rows are kept."""
        import pyarrow as pa

        fields = [f for f in rows_schema() if f.name not in ("row_id", "split")]
        return pa.schema([*fields, pa.field("heldout", pa.bool_()), pa.field("rank", pa.float64())])

    @staticmethod
    def aside_schema():
        """`quarantine.parquet`: where the row was, why it was set aside, and what was there."""
        import pyarrow as pa

        return pa.schema([("row_id", pa.string()), ("source", pa.string()), ("line", pa.int64()), ("reason", pa.string()), ("detail", pa.string()),
                          ("raw", pa.string())])

    def row(self, record: Any) -> dict[str, Any]:
        """A record as a row of one schema or the other; the quarantined have a `reason`."""
        if record.error is not None:
            return self._aside(record, record.error, record.detail, record.text)
        try:
            row = convert(record.raw, self.stage.format, self.stage.fields)
            group = self._group(record)
        except FormatError as error:
            return self._aside(record, error.reason, error.detail, json.dumps(plain(record.raw), ensure_ascii=False))
        meta = row.pop("meta") | (record.meta or {})
        row |= {"content_id": content_id(row), "source": record.source, "line": record.line, "meta": json.dumps(meta, ensure_ascii=False, sort_keys=True)}
        row["group"] = group if group is not None else row["content_id"]
        self.good += 1
        self.warnings.update([UNSEEN_TOOLS] * bool(meta.get("tools")) + [MARKED_BAD] * (meta.get("label") is False))
        self.formats[row["format"]] += 1
        self.sources[record.source] += 1
        return row | {"heldout": self._heldout(row), "rank": _draw(self.seed, "rank", row["content_id"])}

    def _group(self, record: Any) -> str | None:
        field = self.stage.group_by
        if field is None:
            return record.group
        value = record.raw.get(field, (record.meta or {}).get(field))
        if value is None or value == "":
            raise FormatError(f"group field {field!r} is missing", f"the row has {', '.join(sorted(map(str, record.raw)))}")
        return plain(value) if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False, sort_keys=True)

    def _heldout(self, row: dict[str, Any]) -> bool:
        rule = self.stage.heldout
        if rule.groups:
            named = row["group"] in rule.groups
            if named:
                self.named_groups.add(row["group"])
            return named
        return _draw(self.seed, "heldout", row["group"] if rule.by == "group" else row["content_id"]) < rule.share

    def _aside(self, record: Any, reason: str, detail: str, raw: str) -> dict[str, Any]:
        self.faults[reason] += 1
        self.sources[record.source] += 1
        if len(self.examples) < 50:
            self.examples.setdefault(reason, f"{record.source}:{record.line}{': ' + detail if detail else ''}")
        row_id = "q:" + hashlib.sha256(f"{record.source}:{record.line}".encode()).hexdigest()
        return {"row_id": row_id, "source": record.source, "line": record.line, "reason": reason, "detail": detail, "raw": raw}

    def judge(self) -> None:
        """Stop if there is nothing to work with, or too much was unreadable."""
        bad = sum(self.faults.values())
        if not self.good and not bad:
            raise DataError("the sources hold no rows", remedy="check the paths; a file of empty lines has none")
        if not self.good or bad / (self.good + bad) > self.stage.quarantine_limit:
            reasons = "\n".join(f"     {n} x {reason}; first {self.examples.get(reason, '')}" for reason, n in self.faults.most_common(SHOWN))
            share = "none of the rows read so far" if not self.good else f"only {self.good} of {self.good + bad} rows"
            raise DataError(f"{share} can be used (quarantine_limit is {self.stage.quarantine_limit:g}):\n{reasons}",
                            remedy="mend the data, set `format`, `fields` or the source's `encoding`, or raise `quarantine_limit`")


def _draw(seed: int, purpose: str, text: str) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{purpose}:{text}".encode()).digest()[:6], "big") / 2**48


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

