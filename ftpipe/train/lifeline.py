"""The child's side of supervision: die with the parent, and say that one is alive.

A supervised process may not outlive the one that watches it, even if that one is killed with -9. Two means: the kernel sends SIGKILL
when the parent dies (Linux), and a thread exits when a pipe that only the parent holds open is closed. Nothing heavy is imported here.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from ftpipe.processes import ORPHANED, die_with

PIPE, PARENT, EVENTS = "FTPIPE_LIFELINE", "FTPIPE_PARENT", "FTPIPE_EVENTS"
WHERE = signal.SIGUSR1
"""The signal on which a child prints where in its program it is, also where it is stuck in a library that holds the interpreter."""


def hold() -> None:
    """Tie this process to its parent. Called first of all in a child."""
    if PARENT not in os.environ:
        return
    faulthandler.register(WHERE, all_threads=False)
    die_with(int(os.environ[PARENT]))
    threading.Thread(target=_wait, args=(int(os.environ[PIPE]),), daemon=True, name="lifeline").start()


def _wait(fd: int) -> None:
    while os.read(fd, 1):
        pass
    os._exit(ORPHANED)


class Reporter:
    """Tells the parent what this process does, one JSON object a line; every line is also a sign of life."""

    def __init__(self, path: Path | None = None):
        where = path or (Path(os.environ[EVENTS]) if EVENTS in os.environ else None)
        self._file = where.open("a", encoding="utf-8") if where else None
        self.doing = "starting"

    def __call__(self, event: str, **values: Any) -> None:
        if self._file:
            # Not the time of day: who failed first must not depend on a clock that may be set meanwhile.
            self._file.write(json.dumps({"event": event, "time": time.monotonic(), **values}) + "\n")
            self._file.flush()

    def alive(self, doing: str) -> None:
        """Say that this process is alive, and at what it is."""
        self.doing = doing
        self("alive", doing=doing)
