"""Errors that a user can act on: what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FtpipeError(Exception):
    """Base of every error that ftpipe raises on purpose.

    Args:
        what: one sentence that says what is wrong.
        where: file, line, row, field or stage it was found at.
        remedy: what the user can do about it.
    """

    retryable = False

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None):
        super().__init__(what, where, remedy)
        self.what, self.where, self.remedy = what, where, remedy

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  -> {self.remedy}" if self.remedy else text


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


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy that lists the known names, the most alike first, for an unknown `name`."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known) if known else 'none'}"
