"""JSON Lines: one object a line, read as a stream."""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pydantic import Field, field_validator

from ftpipe.data.sources.base import PACKED, FileSource, Part, Record, check_encoding, open_bytes, undecodable

if TYPE_CHECKING:
    from ftpipe.stages.base import Environment

PART = 32 * 2**20
"""Bytes that one process reads at a time of a large file."""
WIDE = ("utf-16", "utf-32")


class Jsonl(FileSource):
    """One JSON object a line; empty lines are passed over. Files ending in .gz, .bz2 or .xz are unpacked on the way."""

    suffixes = (".jsonl", ".ndjson")

    encoding: str = Field(default="utf-8", description="Encoding of the files.")

    _encoding = field_validator("encoding")(check_encoding)

    def split(self, path: Path, name: str) -> list[Part]:
        """Parts of about `PART` bytes, each of whole lines. Not of compressed files, nor where a newline is wider than a byte."""
        size = path.stat().st_size
        if path.suffix in PACKED or self.encoding.startswith(WIDE) or size < 2 * PART:
            return [Part(name, str(path))]
        found, start, line = [], 0, 0
        with path.open("rb") as f:
            while start < size:
                lines, end = 0, min(start + PART, size)
                while f.tell() < end:
                    lines += f.read(min(2**20, end - f.tell())).count(b"\n")
                if end < size:
                    f.seek(end - 1)
                    lines += 0 if f.read(1) == b"\n" else f.readline().endswith(b"\n")
                found.append(Part(name, str(path), start, f.tell(), line))
                start, line = f.tell(), line + lines
        return found

    def part(self, part: Part, env: Environment) -> Iterator[Record]:
        if part.end is None:
            yield from self.read(Path(part.path), part.name)
            return
        with Path(part.path).open("rb") as f:
            f.seek(part.start)
            line = part.line
            while f.tell() < part.end and (data := f.readline()):
                line += 1
                if data.strip():
                    yield self._record(data, part.name, line)

    def read(self, path: Path, name: str) -> Iterator[Record]:
        line = 0
        try:
            with open_bytes(path) as f:
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
