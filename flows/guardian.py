"""A small process beside `ftpipe run` and `ftpipe serve` that outlives them: it owns the local Prefect server and tidies up after a kill -9.

It is started as `python -m flows.guardian '<json>'` in a session of its own, so that ctrl-C in the terminal does not reach the server before
the flow has reported how it ended. It stops when its standard input is closed or its parent is gone. Unless the parent said `done` first,
it waits for flow runs that the parent left behind, and marks those whose process is gone as crashed.

Only the standard library is imported, so that the server's start is not delayed.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PATIENCE = 40.0
"""Seconds to wait for flow processes that their parent left behind; Prefect itself gives them 30 s."""


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent dies. Run in the child, between fork and exec."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def start_server(port: int, log: Path, *, schedules: bool) -> subprocess.Popen:
    """Start a Prefect API with its UI on a local port. Without `schedules` it starts no late or scheduled runs of earlier deployments."""
    url = f"http://127.0.0.1:{port}"
    env = os.environ | {"PREFECT__SERVER_FINAL": "1", "PREFECT_SERVER_API_HOST": "127.0.0.1", "PREFECT_SERVER_API_PORT": str(port),
                        "PREFECT_UI_API_URL": f"{url}/api", "PREFECT_UI_URL": url, "PREFECT_API_URL": f"{url}/api"}
    if not schedules:
        env |= {"PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false", "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        return subprocess.Popen([sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--host", "127.0.0.1",
                                 "--port", str(port), "--log-level", "error", "--lifespan", "on"],
                                env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                                preexec_fn=die_with_parent if sys.platform == "linux" else None)


def wait_for_parent(parent: int, server: subprocess.Popen | None) -> bool:
    """Block until the parent closes our input, says `done` or dies. True if it said `done`, or if the server died first."""
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], 1.0)
        if ready:
            return b"done" in os.read(sys.stdin.fileno(), 64)
        if os.getppid() != parent:
            return False
        if server is not None and server.poll() is not None:
            return True


def tidy_up(api: str, session: str) -> None:
    """Wait for the session's flow runs to end, and mark those as crashed whose process was killed."""
    os.environ["PREFECT_API_URL"] = api
    from flows.stale import mark_crashed

    end = time.monotonic() + PATIENCE
    while mark_crashed(session=session) and time.monotonic() < end:
        time.sleep(0.5)


def main() -> None:
    task = json.loads(sys.argv[1])
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    log = Path(task["log"])
    server = start_server(task["port"], log, schedules=task["schedules"]) if task["port"] else None
    try:
        if not wait_for_parent(task["parent"], server):
            tidy_up(task["api"], task["session"])
    finally:
        if server is not None:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
            if not log.stat().st_size:
                log.unlink()


if __name__ == "__main__":
    main()
