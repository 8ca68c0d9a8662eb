"""Processes: children that do not outlive the one that started them, even if that one is killed with -9, and which process a number stood for."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

ORPHANED = 86
"""Exit status of a child whose parent is gone."""
PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Called first of all in a child: end this process when `parent`, which started it, is gone. The kernel sees to it on Linux, a thread elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True, name="die-with-parent").start()
    if os.getppid() != parent:  # it died before the lines above
        os._exit(ORPHANED)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(ORPHANED)


def born(pid: int) -> str | None:
    """When a process began, as a text that tells it from any other that has its number before or after; None if there is none.

    On Linux these are ticks since the machine started: a time of day would move with the clock whenever that is set.
    """
    if sys.platform != "linux":
        import psutil

        try:
            return f"{psutil.Process(pid).create_time():.1f}"
        except psutil.NoSuchProcess:
            return None
    try:
        fields = _stat(pid)
    except OSError:
        return None
    return f"{fields[19]}@{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()}"


def lives(pid: int, birth: str | None) -> bool:
    """Whether the process that `born` told of is still there (a zombie is not). Without `birth` any process of that number counts."""
    import psutil

    if birth is not None and born(pid) != birth:
        return False
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on; the second, the name, may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
