"""New rows: their identity, their parents, and where they go."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from ftpipe.curate.step import StepContext, connection
from ftpipe.data.rows import ROWS, TRAIN, RowSet, content_id, rows_schema
from ftpipe.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

PARENTS = "parents.parquet"
CHUNK = 10_000


def parents_schema():
    """Arrow schema of `parents.parquet`: row_id of a new row, parent it was made from; one line for each of its parents."""
    import pyarrow as pa

    return pa.schema([("row_id", pa.string()), ("parent", pa.string())])


def new_schema():
    """Arrow schema of what `write_made` returns: row_id of a new row, replaces (the row whose place it takes, or null), reason (why, or null)."""
    import pyarrow as pa

    return pa.schema([("row_id", pa.string()), ("replaces", pa.string()), ("reason", pa.string())])


def write_made(rows: RowSet, ctx: StepContext, made: Iterable[dict[str, Any]]) -> pa.Table:
    """Write new rows and their parents; returns a table of `new_schema()`, in the order they came.

    A new row that says what some row of the pipeline says already (kept, dropped or held out) is left out and counted as `not_new`. One that replaces a row
    is only left out, and the row with it as it was, if it says what a held-out row says.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    iterator = iter(made)
    first = list(islice(iterator, CHUNK))
    if not first:
        return new_schema().empty_table()
    with connection(rows, ctx) as con:
        known = {c for c, in con.sql("select distinct content_id from rows_full").fetchall()}
        held_out = {c for c, in con.sql("select distinct content_id from rows_full where split = 'heldout'").fetchall()}
        groups = dict(con.sql('select row_id, "group" from rows_full').fetchall())
    found: list[dict[str, Any]] = []
    asked = 0
    with pq.ParquetWriter(ctx.out / ROWS, rows_schema(), compression="zstd") as out, \
            pq.ParquetWriter(ctx.out / PARENTS, parents_schema(), compression="zstd") as links:
        chunk = first
        while chunk:
            new, lines = [], []
            for given in chunk:
                asked += 1
                row = _row(given, groups, ctx, asked)
                replaces = given.get("replaces")
                if row["content_id"] in (held_out if replaces else known):
                    continue
                row["row_id"] = _free(row["content_id"], groups)
                known.add(row["content_id"])
                groups[row["row_id"]] = row["group"]
                new.append(row)
                lines += [{"row_id": row["row_id"], "parent": p} for p in given["parents"]]
                found.append({"row_id": row["row_id"], "replaces": replaces, "reason": given.get("reason")})
            out.write_table(pa.Table.from_pylist(new, schema=rows_schema()))
            links.write_table(pa.Table.from_pylist(lines, schema=parents_schema()))
            chunk = list(islice(iterator, CHUNK))
    ctx.counts["made"], ctx.counts["not_new"] = len(found), asked - len(found)
    return pa.Table.from_pylist(found, schema=new_schema())


def _free(content: str, taken: dict[str, str]) -> str:
    """The first of `content`, `content~2`, `content~3`, ... that is no row's id yet."""
    return next(name for n in count(1) if (name := content if n == 1 else f"{content}~{n}") not in taken)


def _row(given: dict[str, Any], groups: dict[str, str], ctx: StepContext, number: int) -> dict[str, Any]:
    parents = given.get("parents")
    if not parents or any(p not in groups for p in parents):
        raise DataError(f"new row {number} names parents that are no rows: {parents}", where=f"{ctx.name} ({ctx.method})")
    row = {c: given.get(c) for c in ("format", "messages", "chosen", "rejected", "text")}
    said = content_id(row)
    meta = {**given.get("meta", {}), "parents": list(parents), "step": ctx.name}
    return {**row, "content_id": said, "group": given.get("group") or groups[parents[0]], "source": f"step:{ctx.method}", "line": number,
            "split": TRAIN, "meta": json.dumps(meta, sort_keys=True, ensure_ascii=False)}
