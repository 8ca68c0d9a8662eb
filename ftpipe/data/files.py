"""Files to read: on this machine, or on a server or in an object store, by URL. Everything behind `File` is the same for both.

URLs are those of fsspec (`s3://bucket/rows-*.jsonl`, `gs://`, `abfs://`, `hf://`, `https://`, `memory://`, ...). What a store wants to know, keys and endpoints
among it, comes from the environment alone: the variables that the store's own library reads (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`,
`GOOGLE_APPLICATION_CREDENTIALS`), or fsspec's, `FSSPEC_<PROTOCOL>_<OPTION>` (`FSSPEC_S3_ENDPOINT_URL`) and `FSSPEC_<PROTOCOL>` with an object of options. So
nothing of it can get into a pipeline's key or an artifact, and child processes have it too.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

from ftpipe.errors import ConfigError, FtpipeError, InfrastructureError, may_pass

PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Compressed files are read as they are; the ending tells."""
BLOCK = 4 * 2**20
"""Bytes that are asked of a server at a time; as many at most are read in vain beyond a part's end."""
TAGS = ("md5Hash", "Content-MD5", "blob_id", "ETag", "etag", "e_tag")
"""What stores say of an object's content, the most exact first: Google's and HTTP's MD5, the hub's git hash, and ETags."""
SKEW = 60.0
"""Seconds that a server's clock may be ahead of ours, when we ask whether a file was left alone for a while."""
DATES = ("LastModified", "last_modified", "Last-Modified", "modified", "mtime", "updated")
REFUSED = (401, 403)
CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "DefaultCredentialsError", "ClientAuthenticationError")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(text: str) -> bool:
    """Whether a path of the configuration is a URL of another place than this machine's disk."""
    return bool(_URL.match(text)) and not text.startswith(("file://", "local://"))


@dataclass(frozen=True)
class File:
    """A file that can be opened as often as needed, in other processes too.

    path: path on this machine, or URL. size: bytes; None if the server does not say. tag: what the store says of the content, for `identity`.
    changed: when it was last written (seconds since 1970), None if nobody says.
    """

    path: str
    size: int | None
    tag: str | None = None
    changed: float | None = None

    @classmethod
    def local(cls, path: Path) -> File:
        return cls(str(path), path.stat().st_size)

    @property
    def suffixes(self) -> list[str]:
        return PurePosixPath(self.path).suffixes

    @property
    def packed(self) -> bool:
        """Whether the ending says that it is compressed."""
        return self.suffixes[-1:] != [] and self.suffixes[-1] in PACKED

    def open(self, block: int = 0) -> BinaryIO:
        """Its bytes, seekable where the server gives parts of files; `block` of them (`BLOCK` by default) are asked of a server at a time.

        Opening raises InfrastructureError if a file elsewhere is no longer the one that was found, so that parts of two are never joined. Reading raises it
        for what a server or the network does wrong, never OSError.
        """
        if not is_url(self.path):
            return Path(self.path).open("rb")
        fs, path = connect(self.path)
        block = block or BLOCK
        with explained(self.path):
            fs.invalidate_cache()
            now = _file(fs, path, fs.info(path))
            if (now.size, now.tag or now.changed) != (self.size, self.tag or self.changed):
                raise InfrastructureError("it was replaced after the run had looked at it", where=self.path, remedy="run again; it is another file now")
            raw = fs.open(path, "rb", block_size=block)
        return io.BufferedReader(_Stream(raw, self), min(block, 2**20))

    @contextmanager
    def unpacked(self) -> Iterator[IO[bytes]]:
        """Its bytes, unpacked if it is compressed."""
        with self.open() as f:
            if not self.packed:
                yield f
                return
            with PACKED[self.suffixes[-1]](f, "rb") as inside:
                yield inside

    def identity(self, cache: Path) -> str:
        """What changes when the content does, for the key of a stage.

        On this machine, the SHA-256 of the content (remembered in `cache` by size and modification time). Of a file elsewhere, what its store says of the
        content: an MD5 or a strong ETag, which S3, Google, Azure and the hub change with every write, and which costs one question and no reading (that of
        a plain web server is as good as the server makes it). A weak ETag (`W/...`) may stay the same over a change, and size and date do not show a change
        of equal length within the date's grain (a second in HTTP, FTP and SFTP): where there is nothing better the file is read and its SHA-256 taken,
        remembered by size and date once it is old enough for the date to tell.
        """
        from ftpipe.models.hashes import cached_digest, remembered

        if not is_url(self.path):
            return cached_digest(Path(self.path), cache)
        if self.tag:
            return f"{self.tag}, {self.size} bytes"
        stamp = {"path": self.path, "size": self.size, "changed": self.changed}
        return remembered(stamp, self.changed and self.changed + SKEW, self._digest, cache)

    def _digest(self) -> str:
        import hashlib

        found = hashlib.sha256()
        with self.open() as f:
            while data := f.read(2**20):
                found.update(data)
        return found.hexdigest()


class _Stream(io.RawIOBase):
    """A file of fsspec's as raw bytes: its errors are ftpipe's own, and an early end is one of them."""

    def __init__(self, file: Any, of: File):
        self.file, self.of = file, of

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self.file.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.file.seek(offset, whence))

    def tell(self) -> int:
        return int(self.file.tell())

    def readinto(self, buffer: Any) -> int:
        with explained(self.of.path):
            data = self.file.read(len(buffer))
        if not data and self.of.size is not None and self.tell() < self.of.size:
            raise InfrastructureError(f"the file ended after {self.tell()} of {self.of.size} bytes", where=self.of.path,
                                      remedy="run again; it may have been replaced while it was read")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


def connect(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path on it. Raises ConfigError for an unknown protocol and for one whose package is missing."""
    import fsspec
    from fsspec.registry import get_filesystem_class, known_implementations

    protocol = url.partition("://")[0]
    try:
        get_filesystem_class(protocol)
    except ValueError as error:
        raise ConfigError(f"nothing here reads {protocol}://", where=url, remedy="write s3://, gs://, abfs://, hf://, https:// or a path") from error
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        package = package if package != "fsspec" else f"'fsspec[{protocol if protocol != 'https' else 'http'}]'"
        raise ConfigError(f"reading {protocol}:// needs a package that is not installed ({error})", where=url,
                          remedy=f"pip install {package} 'fsspec=={fsspec.__version__}'") from error
    with explained(url):
        return fsspec.core.url_to_fs(url)


def matching(url: str, endings: tuple[str, ...]) -> list[File]:
    """The files that a URL means, sorted: one, all below a folder that have one of `endings`, or those that a pattern matches.

    Raises ConfigError for what does not exist or may not be read, InfrastructureError for a server that cannot be reached.
    """
    fs, path = connect(url)
    fs.invalidate_cache()  # a process that lives long must see what was written since
    with explained(url):
        if any(c in path for c in "*?["):
            found = {p: i for p, i in fs.glob(path, detail=True).items() if i["type"] != "directory"}
            if not found:
                raise ConfigError(f"no file matches {url!r}", where=url)
        else:
            info = {"type": "directory"} if url.endswith("/") else fs.info(path)
            found = {path: info}
            if info["type"] == "directory":
                found = {p: i for p, i in fs.find(path, detail=True).items() if p.endswith(endings) and i["type"] != "directory"}
                if not found:
                    raise ConfigError(f"the folder holds no {' or '.join(endings)} file", where=url, remedy="name the files, or another source")
        return [_file(fs, p, info) for p, info in sorted(found.items())]


def _file(fs: Any, path: str, info: dict[str, Any]) -> File:
    """A file from what its store says of it; a listing may say less than the question for one file."""
    url = path if _URL.match(path) else fs.unstrip_protocol(path)
    if not _tag(info):
        info = fs.info(path)
    return File(url, info.get("size"), _tag(info), _changed(info))


def _tag(info: dict[str, Any]) -> str | None:
    for name in TAGS:
        value = info.get(name)
        if isinstance(value, str) and value and not value.startswith("W/"):
            return f"{name} {value.strip(chr(34))}"  # quoted by some, and by some only here and there
    return None


def _changed(info: dict[str, Any]) -> float | None:
    """When an object was last written, in whatever way its store says so."""
    for name in DATES:
        value = info.get(name)
        try:
            if isinstance(value, (int, float)):
                return float(value)
            if isinstance(value, str):
                value = parsedate_to_datetime(value)
        except ValueError:
            continue
        if isinstance(value, datetime):
            return value.timestamp()
    return None


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what a store's library raises into an error that says what to do."""
    try:
        yield
    except FtpipeError:
        raise
    except Exception as error:  # each library has its own
        raise _meaning(error, url) from error


def _meaning(error: Exception, url: str) -> FtpipeError:
    chain, cause = [], error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    said = (str(error).splitlines() or [""])[0][:300]
    if any(isinstance(e, PermissionError) or type(e).__name__ in CREDENTIALS or _status(e) in REFUSED for e in chain):
        return ConfigError(f"access is refused: {said}", where=url,
                           remedy="give this process credentials for it, by the environment: the store's own variables, or FSSPEC_<PROTOCOL>_<OPTION>")
    if any(may_pass(e) for e in chain):
        return InfrastructureError(f"cannot be reached: {said}", where=url, remedy="check the network and the endpoint, then run again")
    if isinstance(error, FileNotFoundError):
        return ConfigError("does not exist", where=url, remedy="check the spelling, and that these credentials may see it")
    if isinstance(error, (ValueError, TypeError, KeyError, NotImplementedError)):
        return ConfigError(f"cannot be read: {said}", where=url, remedy="check the URL and the options in the environment")
    return InfrastructureError(f"cannot be read: {type(error).__name__}: {said}", where=url, remedy="check the network and the endpoint, then run again")


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of a store's library carries."""
    for name in ("status", "code", "status_code"):
        value = getattr(error, name, None)
        if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
            return int(value)
    return None
