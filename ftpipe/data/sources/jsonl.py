"""JSON Lines: one object a line, read as a stream."""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pydantic import Field, field_validator

from ftpipe.data.sources.base import FileSource, Record, check_encoding, open_bytes, undecodable


class Jsonl(FileSource):
    """One JSON object a line; empty lines are passed over. Files ending in .gz, .bz2 or .xz are unpacked on the way."""

    suffixes = (".jsonl", ".ndjson")

    encoding: str = Field(default="utf-8", description="Encoding of the files.")

    _encoding = field_validator("encoding")(check_encoding)

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
        return io.TextIOWrapper(f, encoding=self.encoding, newline="\n") if self.encoding.startswith(("utf-16", "utf-32")) else f

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
