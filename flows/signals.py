"""How a flow process meets its end: undisturbed while it ends its children, and never later than the runner that started it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

GRACE = 25.0
"""Seconds that a flow has to end its children after its runner is gone, before it is ended without further notice."""


@contextmanager
def undisturbed_interrupt() -> Iterator[None]:
    """After a SIGINT, ignore SIGTERM and further SIGINTs until the block is left.

    A ctrl-C on `ftpipe serve` reaches the flow as SIGINT from the terminal and again as SIGTERM from the runner; the second must not
    interrupt the `finally` that ends the training ranks. SIGTERM itself is left to Prefect: it tells the runner that a flow can be cancelled
    only while the handler it installed is in place.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(signum, frame):
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, signal.SIG_IGN)
        raise KeyboardInterrupt

    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def stop_with_parent(enabled: bool, *, every: float = 0.5) -> Iterator[None]:
    """End this process as SIGTERM would when its parent dies: a runner killed with -9 leaves its flow processes alive otherwise.

    The parent's number is watched by a thread; PR_SET_PDEATHSIG would fire as well when merely the thread ends that started us.
    """
    if not enabled:
        yield
        return
    parent, over = os.getppid(), threading.Event()

    def watch() -> None:
        while not over.wait(every):
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(GRACE)
                os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="ftpipe-parent-watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()
