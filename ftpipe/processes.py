"""Child processes that do not outlive the one that started them, even if that one is killed with -9."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

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
