"""Which errors may pass by themselves."""

from __future__ import annotations

import errno
import sqlite3

import httpx
import pytest
import requests

from ftpipe.errors import ArtifactError, ConfigError, DataError, InfrastructureError, TrainingError, may_pass


def answered(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://host")
    return httpx.HTTPStatusError("answered", request=request, response=httpx.Response(status, request=request))


class OutOfMemoryError(RuntimeError):
    """As torch's."""


class OfflineModeIsEnabled(ConnectionError):
    """As that of huggingface_hub, which nobody but the user ends."""


PASS = [InfrastructureError("x"), TimeoutError(), ConnectionResetError(), ConnectionRefusedError(), BrokenPipeError(), requests.ConnectionError("x"),
        requests.ReadTimeout("x"), httpx.ConnectError("x"), httpx.ReadTimeout("x"), answered(503), answered(429),
        sqlite3.OperationalError("database is locked"),
        *(OSError(number, "x") for number in (errno.ENOSPC, errno.EIO, errno.EADDRINUSE, errno.ENETUNREACH, errno.ESTALE))]
STAY = [ConfigError("x"), DataError("x"), TrainingError("nan"), ArtifactError("x"), ValueError("x"), MemoryError(), OutOfMemoryError("CUDA out of memory"),
        FloatingPointError(), FileNotFoundError(errno.ENOENT, "x"), PermissionError(errno.EACCES, "x"), IsADirectoryError(errno.EISDIR, "x"), answered(404),
        answered(401), httpx.UnsupportedProtocol("x"), sqlite3.OperationalError("no such table"), OfflineModeIsEnabled("x"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", PASS, ids=repr)
def test_these_may_pass(error):
    assert may_pass(error)


@pytest.mark.parametrize("error", STAY, ids=repr)
def test_these_would_come_again(error):
    assert not may_pass(error)
