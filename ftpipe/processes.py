"""Processes: children that do not outlive the one that started them, even if that one is killed with -9; which process a number stood for; how to end one
with all that it started."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ORPHANED = 86
"""Exit status of a child whose parent is gone."""
PR_SET_PDEATHSIG = 1
GRACE, POLL = 5.0, 0.05
"""Seconds between SIGTERM and SIGKILL, and between two looks."""


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


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """End processes and everything they started: SIGTERM, then SIGKILL. Returns the ids of those that are alive even so."""
    import psutil

    living = _family(processes)
    for process in living:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while living and time.monotonic() < deadline:
        for p in processes:
            p.poll()
        living = [p for p in living if _alive(p)]
        time.sleep(POLL)
    family = {p.pid: p for p in [*living, *_family(processes)] if _alive(p)}
    for process in family.values():
        _signal(process, signal.SIGKILL)
    for p in processes:
        with suppress(subprocess.TimeoutExpired):
            p.wait(GRACE)
    psutil.wait_procs(list(family.values()), timeout=GRACE)
    return [p.pid for p in family.values() if _alive(p)]


def remember(record: Path, pids: Mapping[str, int]) -> None:
    """Write down processes by name, so that `clean` finds them later."""
    entries = [{"name": name, "pid": pid, "born": began} for name, pid in pids.items() if (began := born(pid))]
    temporary = record.with_name(record.name + ".tmp")
    temporary.write_text(json.dumps(entries), encoding="utf-8")
    os.replace(temporary, record)


def clean(record: Path) -> list[int]:
    """End processes that an earlier, killed parent left behind, by process id and start time. Returns the ids of those it ended."""
    import psutil

    try:
        entries = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    family: dict[int, Any] = {}
    for entry in entries:
        if (now := born(entry["pid"])) not in (None, entry.get("born")):
            continue  # its number was given to another
        if now:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(entry["pid"])
                family |= {p.pid: p for p in [process, *process.children(recursive=True)]}
        family |= {p.pid: p for p in _session(entry["pid"])}  # if it is gone, what it started may be left
    for process in family.values():
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(list(family.values()), timeout=GRACE)
    record.unlink(missing_ok=True)
    return sorted(family)


def _family(processes: Sequence[subprocess.Popen[bytes]]) -> list[Any]:
    """The processes, their descendants, and all that share a session with them (a descendant whose parent is gone)."""
    import psutil

    found: dict[int, Any] = {}
    for popen in processes:
        try:
            if popen.returncode is None:
                process = psutil.Process(popen.pid)
                found |= {p.pid: p for p in [process, *process.children(recursive=True)]}
            elif psutil.pid_exists(popen.pid):
                continue  # the number belongs to somebody else by now: it is free only once its session is empty
        except psutil.NoSuchProcess:
            pass
        found |= {p.pid: p for p in _session(popen.pid)}
    return list(found.values())


def _session(leader: int) -> list[Any]:
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found


def _alive(process: Any) -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(process: Any, number: int) -> None:
    import psutil

    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        process.send_signal(number)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on; the second, the name, may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
