"""The base of every source of rows, and of those that read files."""

from __future__ import annotations

import bz2
import glob
import gzip
import lzma
import os
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from pydantic import Field, field_validator

from ftpipe.errors import ConfigError, DataError, nearest
from ftpipe.slots import Method
from ftpipe.stages.base import Environment

PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Compressed files are read as they are; the ending tells."""


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
    """What can be read apart from the rest: a whole source, a file, or the lines of one that begin at bytes `start` to `end` (None: to its end).

    line: lines before the first.
    """

    name: str = ""
    path: str = ""
    start: int = 0
    end: int | None = None
    line: int = 0

    @property
    def size(self) -> int:
        """Bytes to read, as they lie on the disk; 0 for what is no file."""
        return (self.end if self.end is not None else os.path.getsize(self.path)) - self.start if self.path else 0


class Source(Method):
    """Yields rows with their origin. What cannot be read becomes a record with an error; it never ends the run by itself."""

    slot: ClassVar[str] = "data/sources"

    @abstractmethod
    def records(self, env: Environment) -> Iterator[Record]:
        """The rows in an order that depends on the content alone, streamed: a large source is never held in memory."""

    def parts(self, env: Environment) -> list[Part]:
        """What can be read side by side; together and in this order, all of it. The whole source by default."""
        return [Part()]

    def part(self, part: Part, env: Environment) -> Iterator[Record]:
        """The records of one part."""
        return self.records(env)

    @abstractmethod
    def identity(self, env: Environment) -> dict[str, str]:
        """Hashes of what the source would read, by name. Fast, imports nothing heavy, and says what is missing or empty
        (ConfigError, DataError) before any work begins."""


class FileSource(Source):
    """A source of files. A subclass states its endings and writes `read`."""

    suffixes: ClassVar[tuple[str, ...]] = ()
    """Endings of the files taken from a folder."""

    path: str | list[str] = Field(description="A file, a folder, a pattern such as data/**/*.jsonl, or a list of these, relative to the configuration.")

    @field_validator("path")
    @classmethod
    def _some(cls, value: str | list[str]) -> str | list[str]:
        if not value or not all([value] if isinstance(value, str) else value):
            raise ValueError("name at least one file")
        return value

    @abstractmethod
    def read(self, path: Path, name: str) -> Iterator[Record]:
        """The records of one file; `name` is what they carry as their source."""

    def records(self, env: Environment) -> Iterator[Record]:
        for part in self.parts(env):
            yield from self.part(part, env)

    def parts(self, env: Environment) -> list[Part]:
        return [part for name, path in self.files(env).items() for part in self.split(path, name)]

    def split(self, path: Path, name: str) -> list[Part]:
        """The parts of one file; a format that can be read from the middle overrides it together with `part`."""
        return [Part(name, str(path))]

    def part(self, part: Part, env: Environment) -> Iterator[Record]:
        return self.read(Path(part.path), part.name)

    def identity(self, env: Environment) -> dict[str, str]:
        from ftpipe.models.hashes import cached_digest

        return {name: cached_digest(path, env.cache) for name, path in self.files(env).items()}

    def files(self, env: Environment) -> dict[str, Path]:
        """The files by the name that their rows carry (relative to the configuration where they lie below it), sorted by it.

        Raises ConfigError for what does not exist and DataError for an empty file. Empty files among others of a pattern or folder
        are passed over.
        """
        found: dict[str, Path] = {}
        for text in [self.path] if isinstance(self.path, str) else self.path:
            paths = self._expand(text, env)
            filled = [p for p in paths if p.stat().st_size > 0]
            if not filled:
                raise DataError("the file is empty" if len(paths) == 1 else f"all {len(paths)} files are empty", where=str(paths[0]),
                                remedy="check how it was made or copied, or take it out of the configuration")
            for p in filled:
                found.setdefault(_name(p, env.base, found), p)
        return dict(sorted(found.items()))

    def _expand(self, text: str, env: Environment) -> list[Path]:
        path = env.path(text)
        if path.is_file():
            return [path]
        if path.is_dir():
            endings = tuple(s + packed for s in self.suffixes for packed in ("", *PACKED))
            inside = [p for p in path.rglob("*") if p.is_file() and p.name.endswith(endings)]
            if not inside:
                raise ConfigError(f"the folder holds no {' or '.join(self.suffixes)} file", where=str(path), remedy="name the files, or another source")
            return sorted(inside)
        if glob.has_magic(text):
            matched = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
            if not matched:
                raise ConfigError(f"no file matches {text!r}", where=str(env.base), remedy="paths start from the configuration's folder")
            return matched
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"{text!r} does not exist", where=str(path),
                          remedy=nearest(path.name, siblings[:200]) if siblings else f"the folder {path.parent} does not exist either")


def _name(path: Path, base: Path, taken: dict[str, Path]) -> str:
    """`path` relative to `base`. A file outside of it keeps its own last two parts (more, if another file has the same), so that no folder
    of this machine gets into an artifact."""
    full, base = path.resolve(), base.resolve()
    if full.is_relative_to(base):
        return full.relative_to(base).as_posix()
    names = ("/".join(full.parts[-n:]) for n in range(2, len(full.parts) + 1))
    return next((n for n in names if n not in taken or taken[n].resolve() == full), full.as_posix())


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked if its ending says that it is compressed."""
    return PACKED.get(path.suffix, open)(path, "rb")  # type: ignore[operator]


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
