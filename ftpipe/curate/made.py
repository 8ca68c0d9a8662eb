"""New rows: their identity, their parents, and where they go."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
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


def write_made(rows: RowSet, ctx: StepContext, made: Iterable[dict[str, Any]], kept: pa.Table) -> pa.Table:
    """Write new rows and their parents; returns `kept` with the new rows inserted after the other train rows.

    A new row that says what some row of the pipeline says already (kept, dropped or held out) is left out and counted as `not_new`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    iterator = iter(made)
    first = list(islice(iterator, CHUNK))
    if not first:
        return kept
    with connection(rows, ctx) as con:
        known = dict(con.sql('select content_id, any_value("group") from rows_full group by content_id').fetchall())
        groups = dict(con.sql('select row_id, "group" from rows_full').fetchall())
    ids: list[str] = []
    asked = 0
    with pq.ParquetWriter(ctx.out / ROWS, rows_schema(), compression="zstd") as out, \
            pq.ParquetWriter(ctx.out / PARENTS, parents_schema(), compression="zstd") as links:
        chunk = first
        while chunk:
            new, lines = [], []
            for given in chunk:
                asked += 1
                row = _row(given, groups, ctx, asked)
                if row["content_id"] not in known:
                    known[row["content_id"]] = row["group"]
                    new.append(row)
                    lines += [{"row_id": row["row_id"], "parent": p} for p in given["parents"]]
            ids += [row["row_id"] for row in new]
            out.write_table(pa.Table.from_pylist(new, schema=rows_schema()))
            links.write_table(pa.Table.from_pylist(lines, schema=parents_schema()))
            chunk = list(islice(iterator, CHUNK))
    ctx.counts["made"], ctx.counts["not_new"] = len(ids), asked - len(ids)
    train = pc.equal(kept["split"], TRAIN)
    before = kept.filter(train)
    between = pa.table({"row_id": pa.array(ids, pa.string()), "split": pa.array([TRAIN] * len(ids)), "times": pa.array([1] * len(ids), pa.int32()),
                        "position": pa.array([0] * len(ids), pa.int64())})
    together = pa.concat_tables([before, between.cast(before.schema), kept.filter(pc.invert(train))])
    return together.set_column(together.schema.get_field_index("position"), "position", pa.array(range(together.num_rows), pa.int64()))


def _row(given: dict[str, Any], groups: dict[str, str], ctx: StepContext, number: int) -> dict[str, Any]:
    parents = given.get("parents")
    if not parents or any(p not in groups for p in parents):
        raise DataError(f"new row {number} names parents that are no rows: {parents}", where=f"{ctx.name} ({ctx.method})")
    row = {c: given.get(c) for c in ("format", "messages", "chosen", "rejected", "text")}
    said = content_id(row)
    meta = {**given.get("meta", {}), "parents": list(parents), "step": ctx.name}
    return {**row, "row_id": said, "content_id": said, "group": given.get("group") or groups[parents[0]], "source": f"step:{ctx.method}", "line": number,
            "split": TRAIN, "meta": json.dumps(meta, sort_keys=True, ensure_ascii=False)}
