"""The rows of the pipeline: one schema, written once, selected many times.

`ingest` (and a step that makes new rows) writes `rows.parquet` with the full rows. Every other stage that passes rows on writes only
`kept.parquet`: which rows, how often, in which order. `RowSet` joins the two, so that no stage copies text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.artifacts import Artifact
from ftpipe.canonical import canonical_json
from ftpipe.errors import ArtifactError
from ftpipe.tables import connect

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

ROWS = "rows.parquet"
KEPT = "kept.parquet"
ANNOTATIONS = "annotations.parquet"
TRAIN, HELDOUT = "train", "heldout"
TOOLS = "tools"
"""Role of the turn in front of a conversation that holds the definitions of its tools, a JSON list."""


def rows_schema():
    """Arrow schema of `rows.parquet`.

    row_id: `content_id`, with `~2`, `~3`, ... for further rows of the same content. content_id: see `content_id`.
    format: `messages`, `preference`, `unpaired` or `text`; the columns of other formats are null.
    messages: the conversation, or the prompt of a preference pair or of a judged answer; a first turn of role `tools` holds tool definitions as JSON.
    chosen, rejected: the two answers of a pair. A judged answer (`unpaired`) is chosen if it was called good and rejected if it was called bad, the other null.
    text: plain text. group: what must not be torn apart by the held-out split (module, document, user), never null.
    source, line: file or other origin, and line or item number from 1. split: `train` or `heldout`.
    meta: JSON text with whatever else the source said of the row.
    """
    import pyarrow as pa

    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    return pa.schema([("row_id", pa.string()), ("content_id", pa.string()), ("format", pa.string()), ("messages", turns), ("chosen", turns),
                      ("rejected", turns), ("text", pa.string()), ("group", pa.string()), ("source", pa.string()), ("line", pa.int64()),
                      ("split", pa.string()), ("meta", pa.string())])


def kept_schema():
    """Arrow schema of `kept.parquet`: row_id, split, times (how often an epoch shows the row), position (order, from 0)."""
    import pyarrow as pa

    return pa.schema([("row_id", pa.string()), ("split", pa.string()), ("times", pa.int32()), ("position", pa.int64())])


def content_id(row: dict[str, Any]) -> str:
    """32 hex digits that identify a row by what it says: format, messages, chosen, rejected, text. Origin and split do not count."""
    said = {k: row.get(k) for k in ("format", "messages", "chosen", "rejected", "text")}
    return hashlib.sha256(canonical_json(said).encode()).hexdigest()[:32]


class RowSet:
    """The rows that an artifact passes on."""

    def __init__(self, artifact: Artifact):
        self.artifact = artifact

    @cached_property
    def files(self) -> list[Path]:
        """The Parquet files that hold the full rows, this artifact's own first."""
        found = list(_row_files(self.artifact))
        if not found:
            raise ArtifactError(f"{self.artifact.name} ({self.artifact.kind}) passes no rows on", where=str(self.artifact.path))
        return list(dict.fromkeys(found))

    @contextmanager
    def view(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A DuckDB connection with the view `rows`: every column of `rows_schema()`, and times and position."""
        with connect() as con:
            self.register(con)
            yield con

    def register(self, con: duckdb.DuckDBPyConnection, name: str = "rows") -> None:
        """Create the view `name` on an open connection."""

        files = [str(p) for p in self.files]
        if self.artifact.has(KEPT):
            kept = con.read_parquet(str(self.artifact.file(KEPT)))
            full = con.read_parquet(files)
            kept.create_view(f"{name}_kept", replace=True)
            full.create_view(f"{name}_full", replace=True)
            con.execute(f"create or replace view {name} as select f.* exclude (split), k.split, k.times, k.position "
                        f"from {name}_kept k join {name}_full f using (row_id)")
        else:
            full = con.read_parquet(files, file_row_number=True)
            full.create_view(f"{name}_full", replace=True)
            con.execute(f"create or replace view {name} as select * exclude (file_row_number), 1::integer as times, "
                        f"file_row_number::bigint as position from {name}_full")

    def table(self, split: str | None = TRAIN, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one split (None: of both) in their order, as an Arrow table with the columns of `rows_schema()`, times and position."""
        chosen = ", ".join(f'"{c}"' for c in columns) if columns else "*"
        with self.view() as con:
            where = "" if split is None else "where split = $split"
            parameters = {} if split is None else {"split": split}
            return con.sql(f"select {chosen} from rows {where} order by position", params=parameters).to_arrow_table()

    def ids(self, split: str | None = TRAIN) -> list[str]:
        """The row ids of a split in order."""
        return self.table(split, ["row_id"])["row_id"].to_pylist()

    def count(self, split: str | None = TRAIN) -> int:
        return self.table(split, ["row_id"]).num_rows


    def annotation(self, column: str) -> pa.Table | None:
        """The nearest upstream annotation called `column`, as a table (row_id, column), or None if no step wrote it."""
        import pyarrow.parquet as pq

        for artifact in _chain(self.artifact):
            if artifact.has(ANNOTATIONS) and column in pq.read_schema(artifact.file(ANNOTATIONS)).names:
                return pq.read_table(artifact.file(ANNOTATIONS), columns=["row_id", column])
        return None


def write_annotations(out: Path, table: pa.Table) -> None:
    """Write `annotations.parquet`: row_id, and one column for each thing that a step found out about a row."""
    import pyarrow.parquet as pq

    pq.write_table(table, out / ANNOTATIONS, compression="zstd")


def write_kept(out: Path, table: pa.Table) -> None:
    """Write `kept.parquet` from a table with row_id, and optionally split (train), times (1) and position (the table's order)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    n = table.num_rows
    defaults = {"split": lambda: pa.array([TRAIN] * n), "times": lambda: pa.array([1] * n), "position": lambda: pa.array(range(n))}
    columns = [(table[f.name] if f.name in table.column_names else defaults[f.name]()).cast(f.type) for f in kept_schema()]
    pq.write_table(pa.Table.from_arrays(columns, schema=kept_schema()), out / KEPT, compression="zstd")


def _chain(artifact: Artifact) -> Iterator[Artifact]:
    """The artifact and those its rows came through, nearest first. `meta["rows_from"]` lists the inputs (stage names) that rows come from."""
    yield artifact
    refs = artifact.meta.get("rows_from", [])
    if refs:
        inputs = artifact.inputs()
        for ref in refs:
            yield from _chain(inputs[ref])


def _row_files(artifact: Artifact) -> Iterator[Path]:
    return (a.file(ROWS) for a in _chain(artifact) if a.has(ROWS))
