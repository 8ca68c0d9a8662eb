"""Parquet files, read batch by batch."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from ftpipe.data.files import File
from ftpipe.data.sources.base import FileSource, Record
from ftpipe.errors import ConfigError, DataError, nearest

BATCH = 1024


class Parquet(FileSource):
    """Rows of Parquet files; `line` is the row's number in its file. A damaged file stops the run: there is no telling what it held."""

    suffixes = (".parquet", ".pq")
    libraries = ("pyarrow",)

    columns: list[str] | None = Field(default=None, min_length=1, description="Columns to read; without it all of them.")

    def read(self, file: File, name: str) -> Iterator[Record]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        line = 0
        try:
            with file.open() as data, pq.ParquetFile(data) as f:
                for column in self.columns or ():
                    if column not in f.schema_arrow.names:
                        raise ConfigError(f"there is no column {column!r}", where=file.path, remedy=nearest(column, f.schema_arrow.names))
                for batch in f.iter_batches(batch_size=BATCH, columns=self.columns):
                    for raw in batch.to_pylist():
                        line += 1
                        yield Record(name, line, raw=raw)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"the Parquet file cannot be read after row {line}: {str(error).splitlines()[0]}", where=file.path,
                            remedy="copy or write it again") from error
