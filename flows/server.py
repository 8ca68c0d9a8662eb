"""Which Prefect API a command talks to: the configured one, or a local one that lives as long as the command."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ftpipe.errors import InfrastructureError

SESSION = "FTPIPE_PREFECT_SESSION"
"""Environment variable that names the `ftpipe run` or `ftpipe serve` a flow process belongs to."""
STARTUP = 120.0
USUAL_PORT = 4200


@contextmanager
def api(*, schedules: bool) -> Iterator[str]:
    """The URL of a Prefect API for the block, with Prefect's settings pointing at it.

    With none configured (PREFECT_API_URL, or the active Prefect profile) a local server with its UI is started on the user's own Prefect
    database, on port 4200 if that is free; it ends with the block, or shortly after this process if that is killed.

    Args:
        schedules: the server also makes runs from schedules, as `ftpipe serve` needs.

    Raises:
        InfrastructureError: the configured API does not answer, or the local one does not start.
    """
    with ExitStack() as held:
        url, port, turn = configured(), 0, None
        if url:
            check(url)
        else:
            usual = FileLock(Path(tempfile.gettempdir()) / f"ftpipe-prefect-{os.getuid()}.lock")
            held.callback(usual.release)
            turn = held.enter_context(_turn())
            port = _free_port(USUAL_PORT if _take(usual) else 0)
            url = f"http://127.0.0.1:{port}/api"
        log = prefect_home() / f"ftpipe-server-{port}.log"
        task = {"parent": os.getpid(), "port": port, "api": url, "log": str(log), "schedules": schedules, "session": uuid.uuid4().hex}
        guardian = subprocess.Popen([sys.executable, "-m", "flows.guardian", json.dumps(task)], stdin=subprocess.PIPE, start_new_session=True)
        held.callback(_end, guardian)
        with _environment({"PREFECT_API_URL": url, SESSION: task["session"]} | ({"PREFECT_UI_URL": url.removesuffix("/api")} if port else {})):
            if turn:
                _wait_until_healthy(url, guardian, log)
                turn.release()
            with _settings(heartbeats=schedules):
                yield url


@contextmanager
def _turn() -> Iterator[FileLock]:
    """Servers on one database start one after the other: each brings its tables up to date, and two that do so at once can wait for each other."""
    prefect_home().mkdir(parents=True, exist_ok=True)
    turn = FileLock(prefect_home() / "ftpipe-server.lock")
    try:
        turn.acquire(timeout=2 * STARTUP)
    except Timeout as error:
        raise InfrastructureError("another local Prefect server has been starting for minutes", where=turn.lock_file,
                                  remedy="end the command it belongs to, or use --no-prefect") from error
    try:
        yield turn
    finally:
        turn.release()


def _end(guardian: subprocess.Popen) -> None:
    """Tell the guardian that nothing is left behind, and wait until it and its server are gone."""
    try:
        guardian.stdin.write(b"done\n")
        guardian.stdin.close()
    except BrokenPipeError:
        pass
    try:
        guardian.wait(15)
    except subprocess.TimeoutExpired:
        guardian.kill()
        guardian.wait()


def configured() -> str | None:
    """The API that the user's environment, Prefect profile or project files name; None if there is none."""
    if "PREFECT_API_URL" in os.environ:
        return os.environ["PREFECT_API_URL"] or None
    if _nothing_configured():
        return None
    from prefect.settings import PREFECT_API_URL

    return PREFECT_API_URL.value()


def check(url: str, *, timeout: float = 10.0) -> None:
    """Raise InfrastructureError unless a Prefect API answers at `url`."""
    import httpx

    remedy = "start it (`prefect server start`), correct PREFECT_API_URL, or unset it to use a local server; then try again"
    try:
        answer = httpx.get(f"{url.rstrip('/')}/health", timeout=timeout)
    except httpx.InvalidURL as error:
        raise InfrastructureError(f"PREFECT_API_URL is not a URL: {error}", where=url, remedy=remedy) from error
    except httpx.UnsupportedProtocol as error:
        raise InfrastructureError(f"PREFECT_API_URL is not a URL: {error}", where=url, remedy="write it as http://host:4200/api") from error
    except httpx.HTTPError as error:
        raise InfrastructureError(f"the Prefect API does not answer ({type(error).__name__}: {error})", where=url, remedy=remedy) from error
    if answer.status_code == 404:
        raise InfrastructureError("no Prefect API was found there", where=url, remedy="PREFECT_API_URL ends in /api, such as http://host:4200/api")


def ui(url: str) -> str:
    """Where the UI that belongs to an API is, if nothing else is set: beside it."""
    return os.environ.get("PREFECT_UI_URL") or url.removesuffix("/").removesuffix("/api")


def flush(timeout: float = 10.0) -> None:
    """Wait until the log lines and events that Prefect sends in the background have arrived; they are lost with the process otherwise."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        worker.drain_all(timeout=timeout, at_exit=False)


def prefect_home() -> Path:
    return Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()


def _nothing_configured() -> bool:
    """True if neither a Prefect profile nor a project file can name an API, so that Prefect need not be imported to know it."""
    profiles = prefect_home() / "profiles.toml"
    if any(Path(name).exists() for name in ("prefect.toml", ".env")) or "PREFECT_PROFILES_PATH" in os.environ:
        return False
    try:
        known = tomllib.loads(profiles.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = {}
    except (OSError, ValueError):
        return False
    active = os.environ.get("PREFECT_PROFILE") or known.get("active", "ephemeral")
    return "PREFECT_API_URL" not in known.get("profiles", {}).get(active, {}) and active == "ephemeral"


def _take(lock: FileLock) -> bool:
    """Whether the usual port is ours to try: two commands that start together must not both find it free."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def _free_port(wish: int) -> int:
    for port in (wish, 0):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return s.getsockname()[1]
    raise InfrastructureError("no local port is free for the Prefect server", remedy="try again, or set PREFECT_API_URL")


def _wait_until_healthy(url: str, guardian: subprocess.Popen, log: Path) -> None:
    import httpx

    end = time.monotonic() + STARTUP
    while time.monotonic() < end:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if guardian.poll() is not None:
            break
        time.sleep(0.05)
    lines = log.read_text(errors="replace").strip().splitlines()[-5:] if log.exists() else []
    raise InfrastructureError("the local Prefect server did not start" + "".join(f"\n     {line}" for line in lines), where=str(log),
                              remedy="look at that file; `--no-prefect` runs the same stages without Prefect")


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _settings(*, heartbeats: bool) -> Iterator[None]:
    """Make Prefect read the environment again, in case it was imported before; its background threads use the global settings.

    Without `heartbeats` a flow ends a second sooner. They let a server notice lost runs, which is the guardian's part for a flow in this process.
    """
    import prefect.context
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    prefect.context.refresh_global_settings_context()
    wanted = {PREFECT_API_URL: os.environ["PREFECT_API_URL"]}
    with temporary_settings(wanted if heartbeats else wanted | {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield
