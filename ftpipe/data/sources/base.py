"""The base of every source of rows, and of those that read files."""

from __future__ import annotations

import glob
from abc import abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from ftpipe.data.files import PACKED, File, is_url, matching
from ftpipe.errors import ConfigError, DataError, nearest
from ftpipe.slots import Method
from ftpipe.stages.base import Environment


@dataclass(frozen=True, slots=True)
class Record:
    """One item of a source: a raw row, or the reason why it could not be read.

    source: file or other origin, without anything of this machine. line: line or item number, from 1. raw: the row as an object.
    group: what must not be torn apart by the held-out split, if the source knows. meta: what else it knows of the row.
    error: a short phrase, equal for equal causes; set if and only if raw is None. detail: more about this one. text: what was there.
    """

    source: str
    line: int
    raw: dict[str, Any] | None = None
    group: str | None = None
    meta: dict[str, Any] | None = None
    error: str | None = None
    detail: str = ""
    text: str = ""


@dataclass(frozen=True)
class Part:
    """What can be read apart from the rest: a whole source, a file, or the lines of one that begin at bytes `start` to `end` (None: to its end)."""

    name: str = ""
    file: File | None = None
    start: int = 0
    end: int | None = None

    @property
    def size(self) -> int:
        """Bytes to read, as they lie on the disk; 0 for what is no file, or where nobody knows."""
        return (self.end if self.end is not None else self.file.size or 0) - self.start if self.file else 0


class Source(Method):
    """Yields rows with their origin. What cannot be read becomes a record with an error; it never ends the run by itself."""

    slot: ClassVar[str] = "data/sources"

    @abstractmethod
    def records(self, env: Environment) -> Iterator[Record]:
        """The rows in an order that depends on the content alone, streamed: a large source is never held in memory."""

    def parts(self, env: Environment) -> list[Part]:
        """What can be read side by side; together and in this order, all of it. The whole source by default."""
        return [Part()]

    def part(self, part: Part, env: Environment) -> Generator[Record, None, int | None]:
        """The records of one part. Of one that begins inside a file the lines count from the part's first, and the generator returns how many it has."""
        yield from self.records(env)

    @abstractmethod
    def identity(self, env: Environment) -> dict[str, str]:
        """Hashes of what the source would read, by name. Fast, imports nothing heavy, and says what is missing or empty
        (ConfigError, DataError) before any work begins."""


class FileSource(Source):
    """A source of files. A subclass states its endings and writes `read`."""

    suffixes: ClassVar[tuple[str, ...]] = ()
    """Endings of the files taken from a folder."""

    path: str | list[str] = Field(description="A file, a folder, a pattern such as data/**/*.jsonl, or a list of these, relative to the configuration; "
                                  "or URLs such as s3://bucket/rows-*.jsonl.gz.")

    @field_validator("path")
    @classmethod
    def _some(cls, value: str | list[str]) -> str | list[str]:
        if not value or not all([value] if isinstance(value, str) else value):
            raise ValueError("name at least one file")
        for text in [value] if isinstance(value, str) else value:
            if text.startswith(("http://", "https://")) and "?" in text:
                raise ValueError("a URL with a query is not read: a signature in it would be written into artifacts; name the object itself, and give "
                                 "credentials to the environment")
        return value

    @abstractmethod
    def read(self, file: File, name: str) -> Iterator[Record]:
        """The records of one file; `name` is what they carry as their source."""

    def records(self, env: Environment) -> Iterator[Record]:
        before = 0
        for part in self.parts(env):
            before = before if part.start else 0
            before += (yield from _after(before, self.part(part, env))) or 0

    def parts(self, env: Environment) -> list[Part]:
        return [part for name, file in self.files(env).items() for part in self.split(file, name)]

    def split(self, file: File, name: str) -> list[Part]:
        """The parts of one file; a format that can be read from the middle overrides it together with `part`."""
        return [Part(name, file)]

    def part(self, part: Part, env: Environment) -> Generator[Record, None, int | None]:
        yield from self.read(part.file, part.name)

    def identity(self, env: Environment) -> dict[str, str]:
        return {name: file.identity(env.cache) for name, file in self.files(env).items()}

    def files(self, env: Environment) -> dict[str, File]:
        """The files by the name that their rows carry (relative to the configuration where they lie below it, the URL of one elsewhere), sorted by it.

        Raises ConfigError for what does not exist or may not be read and DataError for an empty file. Empty files among others of a pattern or folder
        are passed over.
        """
        found: dict[str, File] = {}
        for text in [self.path] if isinstance(self.path, str) else self.path:
            files = self._expand(text, env)
            filled = [f for f in files if f.size != 0]
            if not filled:
                raise DataError("the file is empty" if len(files) == 1 else f"all {len(files)} files are empty", where=files[0].path,
                                remedy="check how it was made or copied, or take it out of the configuration")
            for f in filled:
                found.setdefault(_name(f, env.base, found), f)
        return dict(sorted(found.items()))

    def _expand(self, text: str, env: Environment) -> list[File]:
        endings = tuple(s + packed for s in self.suffixes for packed in ("", *PACKED))
        if is_url(text):
            return matching(text, endings)
        text = text.removeprefix("file://").removeprefix("local://")
        path = env.path(text)
        if path.is_file():
            return [File.local(path)]
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.is_file() and p.name.endswith(endings)]
            if not inside:
                raise ConfigError(f"the folder holds no {' or '.join(self.suffixes)} file", where=str(path), remedy="name the files, or another source")
            return [File.local(p) for p in sorted(inside)]
        if glob.has_magic(text):
            matched = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
            if not matched:
                raise ConfigError(f"no file matches {text!r}", where=str(env.base), remedy="paths start from the configuration's folder")
            return [File.local(p) for p in matched]
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"{text!r} does not exist", where=str(path),
                          remedy=nearest(path.name, siblings[:200]) if siblings else f"the folder {path.parent} does not exist either")


def _after(before: int, records: Generator[Record, None, int | None]) -> Generator[Record, None, int | None]:
    """The records of a part under the lines of their file, of which `before` come before the part's own."""
    while True:
        try:
            record = next(records)
        except StopIteration as end:
            return end.value
        yield replace(record, line=record.line + before)


def _name(file: File, base: Path, taken: dict[str, File]) -> str:
    """The file's path relative to `base`. One outside of it keeps its own last two parts (more, if another file has the same), so that no folder
    of this machine gets into an artifact; one elsewhere keeps its URL."""
    if is_url(file.path):
        return file.path
    full, base = Path(file.path).resolve(), base.resolve()
    if full.is_relative_to(base):
        return full.relative_to(base).as_posix()
    names = ("/".join(full.parts[-n:]) for n in range(2, len(full.parts) + 1))
    return next((n for n in names if n not in taken or Path(taken[n].path).resolve() == full), full.as_posix())


def check_encoding(value: str) -> str:
    """For a field's validator: the encoding must exist."""
    import codecs

    try:
        return codecs.lookup(value).name
    except LookupError:
        raise ValueError(f"no encoding is called {value!r}; common ones: utf-8, latin-1, cp1252, utf-16, shift_jis, gb18030") from None


def undecodable(data: bytes, error: UnicodeDecodeError) -> tuple[str, str]:
    """Reason and detail for bytes that are not in the encoding."""
    return (f"not valid {error.encoding}",
            f"byte 0x{data[error.start]:02x} at position {error.start} ({error.reason}); set `encoding` if the file is in another one")
