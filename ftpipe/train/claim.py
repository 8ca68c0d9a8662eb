"""Devices are claimed: one training at a time on each, whoever started it on this machine."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

POLL = 1.0
"""Seconds between looks for a free device."""


def visible(count: int) -> list[str]:
    """Names of the GPUs this process may use: those of CUDA_VISIBLE_DEVICES, else the first `count` by number."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [d.strip() for d in given.split(",") if d.strip()] if given is not None else [str(i) for i in range(count)]


@contextmanager
def claimed(wanted: int, devices: Sequence[str], log: Callable[[str], None], folder: Path | None = None) -> Iterator[list[str]]:
    """Hold `wanted` of `devices` for the block; waits, and says so, until as many are free. A killed holder lets go of them.

    All are taken at once or none, so that two trainings that each need several never wait for each other.

    Args:
        folder: where the lock files lie; one for each user of the machine by default.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"ftpipe-devices-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    said = False
    with ExitStack() as held:
        while True:
            if taken := _take(wanted, devices, folder, held):
                yield taken
                return
            if not said:
                log(f"{wanted} of {len(devices)} devices are wanted and not free; waiting for other trainings (`share_devices: true` does not wait)")
                said = True
            time.sleep(POLL)


def _take(wanted: int, devices: Sequence[str], folder: Path, held: ExitStack) -> list[str]:
    """`wanted` free devices, their locks entered into `held`; none if there are fewer."""
    with FileLock(folder / "all.lock"), ExitStack() as tried:
        found = []
        for device in devices:
            lock = FileLock(folder / f"{''.join(c if c.isalnum() else '-' for c in device)}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            tried.callback(lock.release)
            found.append(device)
            if len(found) == wanted:
                held.push(tried.pop_all())
                return found
        return []
