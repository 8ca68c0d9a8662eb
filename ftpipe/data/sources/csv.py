"""CSV and other separated tables, read as a stream."""

from __future__ import annotations

import csv as codec
import io
from collections.abc import Iterator

from pydantic import Field, field_validator

from ftpipe.data.files import File
from ftpipe.data.sources.base import FileSource, Record, check_encoding
from ftpipe.errors import DataError

FIELD_LIMIT = 2**24
"""Characters a field may have."""


class Csv(FileSource):
    """A table with a header line; every value is text, an empty one is null. `line` is the line of the file at which the row starts."""

    suffixes = (".csv", ".tsv")

    delimiter: str | None = Field(default=None, min_length=1, max_length=1, description="Separator; without it a tab for .tsv and a comma for all others.")
    encoding: str = Field(default="utf-8", description="Encoding of the files.")

    _encoding = field_validator("encoding")(check_encoding)

    def read(self, file: File, name: str) -> Iterator[Record]:
        codec.field_size_limit(FIELD_LIMIT)
        delimiter = self.delimiter or ("\t" if ".tsv" in file.suffixes else ",")
        wide = self.encoding.startswith(("utf-16", "utf-32"))
        # A byte that is not in the encoding becomes a lone surrogate, so that it spoils its own row only.
        with file.unpacked() as packed, io.TextIOWrapper(packed, self.encoding, errors="strict" if wide else "surrogateescape", newline="") as f:
            reader = codec.reader(f, delimiter=delimiter, strict=True)
            header = self._header(reader, file.path)
            while True:
                line = reader.line_num + 1
                try:
                    values = next(reader)
                except StopIteration:
                    return
                except codec.Error as error:
                    yield Record(name, line, error="not valid CSV", detail=f"{error} (lines {line} to {reader.line_num})")
                    continue
                except UnicodeDecodeError as error:
                    yield Record(name, line, error=f"not valid {self.encoding}", detail=f"{error.reason}; nothing after this line could be read")
                    return
                if values:
                    yield self._record(values, header, name, line, delimiter)

    def _record(self, values: list[str], header: list[str], name: str, line: int, delimiter: str) -> Record:
        text = delimiter.join(values)
        if not text.isascii() and (stray := next((c for c in text if "\udc80" <= c <= "\udcff"), None)):
            shown = text.encode(self.encoding, errors="surrogateescape").decode(self.encoding, errors="backslashreplace")
            return Record(name, line, error=f"not valid {self.encoding}", text=shown,
                          detail=f"byte 0x{ord(stray) - 0xDC00:02x}; set `encoding` if the file is in another one")
        if len(values) != len(header):
            return Record(name, line, error="wrong number of columns", detail=f"{len(values)}, the header has {len(header)}", text=text)
        return Record(name, line, raw={k: v if v != "" else None for k, v in zip(header, values)})

    def _header(self, reader: Iterator[list[str]], path: str) -> list[str]:
        try:
            header = [h.strip().removeprefix("\ufeff") for h in next(reader)]
        except StopIteration:
            raise DataError("the file has no header line", where=path) from None
        except (codec.Error, UnicodeDecodeError) as error:
            raise DataError(f"the header line cannot be read: {error}", where=path, remedy="check `delimiter` and `encoding`") from error
        if len(set(header)) != len(header) or not all(header):
            raise DataError(f"the header has empty or repeated names: {', '.join(header)}", where=f"{path}:1", remedy="the first line must name the columns")
        return header
