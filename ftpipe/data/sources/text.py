"""Plain text files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from pydantic import Field, field_validator

from ftpipe.data.files import File
from ftpipe.data.sources.base import FileSource, Record, check_encoding, undecodable


class Text(FileSource):
    """One row a file, a paragraph (separated by empty lines) or a line. The file is the group; `line` is where the row starts."""

    suffixes = (".txt", ".md", ".rst", ".text")

    unit: Literal["file", "paragraph", "line"] = Field(default="paragraph", description="What becomes a row.")
    min_chars: int = Field(default=1, ge=1, description="Shorter units are joined to the next one of their file.")
    encoding: str = Field(default="utf-8", description="Encoding of the files.")

    _encoding = field_validator("encoding")(check_encoding)

    def read(self, file: File, name: str) -> Iterator[Record]:
        for line, data in self._units(file):
            try:
                text = data.decode(self.encoding) if isinstance(data, bytes) else data
            except UnicodeDecodeError as error:
                reason, detail = undecodable(data, error)
                yield Record(name, line, error=reason, detail=detail, text=data.decode(self.encoding, errors="backslashreplace"))
                continue
            text = text.removeprefix("\ufeff").replace("\r\n", "\n").strip("\n")
            if text.strip():
                yield Record(name, line, raw={"text": text}, group=name)

    def _units(self, file: File) -> Iterator[tuple[int, bytes]]:
        with file.unpacked() as f:
            if self.unit == "file" or self.encoding.startswith(("utf-16", "utf-32")):
                yield from self._whole(f.read())
                return
            yield from self._split(f, self.encoding)

    def _whole(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """A file read at once: the unit is the file, or its newlines are wider than a byte."""
        if self.unit == "file":
            yield 1, data
            return
        try:
            lines = data.decode(self.encoding).encode().splitlines(keepends=True)
        except UnicodeDecodeError:
            yield 1, data
            return
        for line, unit in self._split(lines, "utf-8"):
            yield line, unit.decode().encode(self.encoding)

    def _split(self, lines: Iterable[bytes], encoding: str) -> Iterator[tuple[int, bytes]]:
        start, unit = 1, b""
        for number, line in enumerate(lines, start=1):
            if not unit.strip():
                start, unit = number, b""
            unit += line
            if (self.unit == "line" or not line.strip()) and len(unit.decode(encoding, errors="ignore").strip()) >= self.min_chars:
                yield start, unit
                unit = b""
        if unit.strip():
            yield start, unit
