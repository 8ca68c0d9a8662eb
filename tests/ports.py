"""Ports for the servers that tests start."""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path

FIRST, EACH = 20_000, 500
LAST = 32_768
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")

_tried = itertools.count()


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens, never the same one twice in a process.

    A port that the system hands out (bind to 0) is free again until the server it is for has started, which takes seconds; meanwhile the
    system may give it to another process (Ray and gloo ask for dozens). So it is taken from below those that the system hands out, and
    each process of a test run has its own share of them.
    """
    handed_out = int(RANGE.read_text().split()[0]) if RANGE.exists() else LAST
    shares = (min(LAST, handed_out) - FIRST) // EACH
    if shares > 0:
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
        run = int(os.environ.get("PYTEST_XDIST_TESTRUNUID", "0")[:8], 16)  # so that two test runs at once are apart as well
        start = FIRST + (run + worker) % shares * EACH
        for port in itertools.islice((start + i % EACH for i in _tried), EACH):
            if _free(port):
                return port
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _free(port: int) -> bool:
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
