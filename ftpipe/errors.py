"""Errors that a user can act on: what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
import errno
import socket
import sys
from collections.abc import Iterable
from typing import Any

from ftpipe.secrets import hide

PASSING = frozenset(getattr(errno, name) for name in (
    "EIO", "ENOSPC", "EDQUOT", "EAGAIN", "EBUSY", "ETXTBSY", "EMFILE", "ENFILE", "ENOLCK", "ESTALE", "EINTR", "EADDRINUSE", "EADDRNOTAVAIL", "ECONNREFUSED",
    "ECONNRESET", "ECONNABORTED", "EPIPE", "ETIMEDOUT", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "EREMOTEIO",
) if hasattr(errno, name)) | {socket.EAI_AGAIN}
"""Numbers of OSErrors that go away by themselves or by somebody's help: a full or failing disk, a taken port, a network that is down."""
LIBRARIES = {"requests": ("ConnectionError", "Timeout"), "httpx": ("TimeoutException", "NetworkError", "RemoteProtocolError"),
             "httpx2": ("TimeoutException", "NetworkError", "RemoteProtocolError"), "aiohttp": ("ClientConnectionError",)}
"""The classes by which libraries that talk to servers say that the network failed."""
DATABASE = ("locked", "busy", "connection refused", "closed the connection unexpectedly", "terminating connection", "starting up", "shutting down",
            "too many clients", "deadlock detected", "could not serialize")
"""What SQLite and PostgreSQL say of something that goes away by itself: another at work, a restart."""
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses of a server that may answer later."""


class FtpipeError(Exception):
    """Base of every error that ftpipe raises on purpose.

    Args:
        what: one sentence that says what is wrong.
        where: file, line, row, field or stage it was found at.
        remedy: what the user can do about it.
    """

    retryable = False

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None):
        what, where, remedy = hide(what), hide(where) if where else where, hide(remedy) if remedy else remedy
        super().__init__(what, where, remedy)
        self.what, self.where, self.remedy = what, where, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return _raised, (type(self), self.args, self.__dict__)  # so that a child process can hand it to its parent

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  -> {self.remedy}" if self.remedy else text


def _raised(kind: type[FtpipeError], args: tuple[Any, ...], state: dict[str, Any]) -> FtpipeError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class ConfigError(FtpipeError):
    """The configuration cannot be run as written."""


class DataError(FtpipeError):
    """The data cannot be used as given."""


class ArtifactError(FtpipeError):
    """An artifact is missing, incomplete or altered."""


class TrainingError(FtpipeError):
    """Training stopped for a reason that a retry would meet again (NaN, out of memory, bad batch)."""


class InfrastructureError(FtpipeError):
    """Something outside the computation failed (disk, network, port, lost process); a retry may succeed."""

    retryable = True


def may_pass(error: BaseException) -> bool:
    """Whether what raised `error` may work when it is tried again: input and output, the network, a taken port, a busy server.

    An error of ftpipe's own says so itself (`retryable`). Everything else (NaN, memory that ran out, bad settings, a fault in the code) would come again.
    """
    if isinstance(error, FtpipeError):
        return error.retryable
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in BUSY
    if isinstance(error, (TimeoutError, BrokenPipeError, ConnectionAbortedError, ConnectionRefusedError, ConnectionResetError)):
        return True
    if isinstance(error, OSError) and error.errno in PASSING:
        return True
    if type(error).__name__ == "OperationalError" and any(word in str(error).lower() for word in DATABASE):
        return True  # a database's driver, directly or through SQLAlchemy
    return any(isinstance(error, cls) for name, classes in LIBRARIES.items() if name in sys.modules
               for cls in (getattr(sys.modules[name], c, None) for c in classes) if isinstance(cls, type))


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy that lists the known names, the most alike first, for an unknown `name`."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known) if known else 'none'}"
