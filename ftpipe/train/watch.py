"""How the ranks of several machines find each other, and notice that a machine is gone.

A machine that loses its power or its network closes no connection, so a rank that waits for it would wait for as long as it would for a slow one.
The first rank of each machine therefore counts up a number of its own in the store through which the ranks met, over the same network, and looks
whether the others' numbers move. Only this process's own monotonic clock is used.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ftpipe.train.meeting import named

if TYPE_CHECKING:
    from ftpipe.train.lifeline import Reporter
    from ftpipe.train.setup import Job


def store(job: Job, rank: int) -> Any:
    """torch's TCP store at `job.rendezvous` (tcp://address:port); rank 0 keeps it, the others wait for it."""
    import datetime

    import torch.distributed as dist

    address, _, port = job.rendezvous.removeprefix("tcp://").rpartition(":")
    return dist.TCPStore(address, int(port), None, rank == 0, timeout=datetime.timedelta(seconds=job.join), wait_for_workers=False)


class Watch:
    """Watches the other machines from this one's first rank, in threads; a lost one is reported and ends this process.

    Args:
        silence: `job.silence`, seconds.
    """

    def __init__(self, job: Job, place: int, report: Reporter):
        self.job, self.place, self.report = job, place, report
        self.over = threading.Event()
        self.counts = [0] * len(job.nodes)
        self.beating = threading.Thread(target=self._beat, name="ftpipe-beat", daemon=True)
        self.heard: dict[int, float] = {}
        """When each other machine's number last moved; those that were never heard of are still importing their libraries."""

    def start(self) -> None:
        for thread in (self.beating, threading.Thread(target=self._judge, name="ftpipe-judge", daemon=True)):
            thread.start()

    def stop(self) -> None:
        """This machine has done its part; the others are told not to wait for it."""
        self.over.set()
        self.beating.join(2)

    def _beat(self) -> None:
        """Every call of the store may hang on a broken network, hence the second thread."""
        pause = min(1.0, self.job.silence / 5)
        with suppress(Exception):  # what it heard gets old then, which is the other thread's business
            shared = store(self.job, rank=-1)
            while not self.over.wait(pause):
                shared.add(f"beat/{self.place}", 1)
                for other in range(len(self.counts)):
                    count = shared.add(f"beat/{other}", 0) if other != self.place else 0
                    if count != self.counts[other]:
                        self.counts[other], self.heard[other] = count, time.monotonic()
                    if shared.check([f"left/{other}"]):
                        self.heard.pop(other, None)
            shared.set(f"left/{self.place}", "1")

    def _judge(self) -> None:
        while not self.over.wait(min(1.0, self.job.silence / 5)):
            lost = [n for n, when in list(self.heard.items()) if time.monotonic() - when > self.job.silence]
            if lost:
                self._lost(0 if 0 in lost else lost[0])  # without the first machine, which keeps the store, nothing is heard of any other

    def _lost(self, other: int) -> None:
        own, gone = named(self.job.nodes[self.place]), named(self.job.nodes[other])
        self.report("failed", kind="InfrastructureError", echo=other == 0, where=None,
                    what=f"nothing was heard of node {gone} for {self.job.silence:g} s: it is gone, or the network between it and {own}",
                    remedy="see whether that machine runs and can be reached; run again, it resumes from the last checkpoint; `least` goes on with fewer")
        os._exit(1)


def broken(error: BaseException) -> bool:
    """Whether an error tells of a connection between ranks that broke."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Gloo", "NCCL")))
