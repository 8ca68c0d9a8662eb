"""JSON Lines: one object a line, read as a stream."""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Generator, Iterator
from typing import IO, TYPE_CHECKING

from pydantic import Field, field_validator

from ftpipe.data.files import File
from ftpipe.data.sources.base import FileSource, Part, Record, check_encoding, undecodable

if TYPE_CHECKING:
    from ftpipe.stages.base import Environment

PART = 32 * 2**20
"""Bytes that one process reads at a time of a large file."""
SEEN = 2**16
"""Bytes that are read around the place where a file is parted."""
WIDE = ("utf-16", "utf-32")


class Jsonl(FileSource):
    """One JSON object a line; empty lines are passed over. Files ending in .gz, .bz2 or .xz are unpacked on the way."""

    suffixes = (".jsonl", ".ndjson")

    encoding: str = Field(default="utf-8", description="Encoding of the files.")

    _encoding = field_validator("encoding")(check_encoding)

    def split(self, file: File, name: str) -> list[Part]:
        """Parts of about `PART` bytes, each of whole lines. Not of compressed files, nor where a newline is wider than a byte."""
        size = file.size or 0
        if file.packed or self.encoding.startswith(WIDE) or size < 2 * PART:
            return [Part(name, file)]
        found, start = [], 0
        with file.open(SEEN) as f:
            while start < size:
                end = min(start + PART, size)
                if end < size:
                    f.seek(end - 1)
                    end += len(f.readline()) - 1  # what is left of the line that the last byte belongs to
                found.append(Part(name, file, start, end))
                start = end
        return found

    def part(self, part: Part, env: Environment) -> Generator[Record, None, int | None]:
        if part.end is None:
            yield from self.read(part.file, part.name)
            return None
        with part.file.open() as f:
            f.seek(part.start)
            line, at = 0, part.start
            while at < part.end and (data := f.readline()):
                line, at = line + 1, at + len(data)
                if data.strip():
                    yield self._record(data, part.name, line)
        return line

    def read(self, file: File, name: str) -> Iterator[Record]:
        line = 0
        try:
            with file.unpacked() as f:
                for line, data in enumerate(self._lines(f), start=1):
                    if data.strip():
                        yield parse(data.strip(), name, line) if isinstance(data, str) else self._record(data, name, line)
        except UnicodeDecodeError as error:
            yield Record(name, line + 1, error=f"not valid {error.encoding}", detail=f"{error.reason}; nothing after this line could be read")
        except (EOFError, OSError, lzma.LZMAError) as error:  # a compressed file that was cut off or damaged; what came before it has been read
            yield Record(name, line + 1, error="the compressed file is damaged", detail=f"{error}; nothing after this line could be read")

    def _lines(self, f: IO[bytes]) -> Iterator[bytes] | Iterator[str]:
        """Lines as bytes, so that one bad line does not spoil the next. In UTF-16 and UTF-32, where a newline is wider than a byte, as text."""
        return io.TextIOWrapper(f, encoding=self.encoding, newline="\n") if self.encoding.startswith(WIDE) else f

    def _record(self, data: bytes, name: str, line: int) -> Record:
        try:
            text = data.decode(self.encoding)
        except UnicodeDecodeError as error:
            reason, detail = undecodable(data, error)
            return Record(name, line, error=reason, detail=detail, text=data.decode(self.encoding, errors="backslashreplace"))
        return parse(text.removeprefix("\ufeff").strip(), name, line)


def parse(text: str, name: str, line: int) -> Record:
    """A record from one JSON text, which must be an object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        cut = isinstance(error, json.JSONDecodeError) and (error.pos >= len(text) or error.msg.startswith("Unterminated string"))
        detail = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
        return Record(name, line, error="the JSON is cut off" if cut else "not valid JSON", detail=detail, text=text)
    if not isinstance(value, dict):
        return Record(name, line, error="not a JSON object", detail=f"it is {type(value).__name__}", text=text)
    return Record(name, line, raw=value)
