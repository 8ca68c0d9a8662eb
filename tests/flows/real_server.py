"""A real Prefect server, `ftpipe serve` and `ftpipe run` as processes of their own, for the end-to-end tests."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.ports import free_port
from tests.stages_for_tests import stop, wait_for

FTPIPE = [sys.executable, "-c", "from ftpipe.cli import main; main()"]
QUIET = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "OMP_NUM_THREADS": "1"}


def environment(home: Path, extra: dict[str, str]) -> dict[str, str]:
    """The environment of a user whose Prefect database is in `home` and who has no Prefect server configured."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")}
    return kept | QUIET | {"PREFECT_HOME": str(home)} | extra


class Api:
    """The few calls to Prefect's REST API that the tests need."""

    def __init__(self, url: str):
        self.url = url

    def get(self, path: str) -> Any:
        return self._ask("GET", path)

    def post(self, path: str, body: Any = None) -> Any:
        return self._ask("POST", path, json=body if body is not None else {})

    def _ask(self, method: str, path: str, **more: Any) -> Any:
        for attempt in range(10):
            answer = httpx.request(method, f"{self.url}{path}", timeout=30, **more)
            if answer.status_code != 503:  # SQLite was locked; Prefect's own client asks again too
                break
            time.sleep(0.3 * (attempt + 1))
        answer.raise_for_status()
        return answer.json()

    def deployment(self, name: str) -> Any:
        """The deployment of the main flow called `name`, or None."""
        answer = httpx.get(f"{self.url}/deployments/name/data-to-model/{name}", timeout=30)
        return answer.json() if answer.status_code == 200 else None

    def runs(self, deployment: str, *states: str) -> list[Any]:
        where: dict[str, Any] = {"deployment_id": {"any_": [deployment]}}
        if states:
            where["state"] = {"type": {"any_": list(states)}}
        return self.post("/flow_runs/filter", {"flow_runs": where, "sort": "EXPECTED_START_TIME_ASC", "limit": 200})

    def start(self, deployment: str, after: str | None = None) -> str:
        """A new run of a deployment, for now or (ISO 8601) later."""
        when = {"state_details": {"scheduled_time": after}} if after else {}
        return self.post(f"/deployments/{deployment}/create_flow_run", {"state": {"type": "SCHEDULED"} | when})["id"]

    def run(self, id: str) -> Any:
        return self.get(f"/flow_runs/{id}")

    def tasks(self, id: str) -> list[Any]:
        return self.post("/task_runs/filter", {"flow_runs": {"id": {"any_": [id]}}})

    def artifacts(self, id: str) -> list[Any]:
        return self.post("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [id]}}})

    def logs(self, id: str) -> list[str]:
        return [line["message"] for line in self.post("/logs/filter", {"logs": {"flow_run_id": {"any_": [id]}}, "limit": 200})]


class Server:
    """`prefect server start` on a free port, with its database in `home` unless `extra` names another; it can be killed and started again."""

    def __init__(self, home: Path, extra: dict[str, str] | None = None):
        self.home, self.extra, self.port = home, extra or {}, free_port()
        self.api = Api(f"http://127.0.0.1:{self.port}/api")
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        with (self.home / "server.out").open("ab") as out:
            env = environment(self.home, {"PREFECT_UI_API_URL": self.api.url} | self.extra)
            self.process = subprocess.Popen([sys.executable, "-m", "prefect", "server", "start", "--port", str(self.port)], stdout=out,
                                            env=env, stderr=subprocess.STDOUT, start_new_session=True)
        wait_for(lambda: self.process.poll() is not None or _healthy(self.api.url), 120, what="the Prefect server's start")
        assert self.process.poll() is None, (self.home / "server.out").read_text()

    def kill(self) -> None:
        """kill -9 of all of it."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None:
            stop(self.process)


@contextmanager
def prefect_server(home: Path) -> Iterator[Api]:
    """A server for the length of the block."""
    server = Server(home)
    try:
        server.start()
        yield server.api
    finally:
        server.stop()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def ftpipe(arguments: list[str], env: dict[str, str], log: Path, *, background: bool = False) -> Iterator[subprocess.Popen]:
    """An `ftpipe` command in a process group of its own, as a shell would start it; a script's `&` makes it ignore SIGINT."""
    ignore = (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if background else None
    with log.open("ab") as out:
        process = subprocess.Popen([*FTPIPE, *arguments], env=env, stdout=out, stderr=subprocess.STDOUT, process_group=0, cwd=log.parent, preexec_fn=ignore)
    try:
        yield process
    finally:
        stop(process)


@contextmanager
def serving(config: Path, api: Api, env: dict[str, str], *arguments: str, background: bool = False) -> Iterator[tuple[subprocess.Popen, str]]:
    """`ftpipe serve` and the id of its deployment, once it polls for runs."""
    log = config.parent / f"serve-{time.monotonic_ns()}.log"
    env = env | {"PREFECT_API_URL": api.url, "PREFECT_RUNNER_POLL_FREQUENCY": "2"}
    with ftpipe(["serve", str(config), *arguments], env, log, background=background) as process:
        found, _ = wait_for(lambda: process.poll() is not None or api.deployment(config.stem), 90, what="the deployment")
        assert process.poll() is None, log.read_text()
        wait_for(lambda: "is served" in log.read_text(), 30, what="the runner")
        yield process, found["id"]


def pids(workspace: Path) -> dict[str, Any]:
    """Process numbers that the stage `ranks` wrote: of its children, of the flow and of the flow's parent."""
    path = workspace / "ranks.json"
    return json.loads(path.read_text()) if path.exists() else {}


def interrupt(process: subprocess.Popen) -> None:
    """What a terminal does on ctrl-C: SIGINT to the whole process group."""
    os.killpg(process.pid, signal.SIGINT)


def query(home: Path, sql: str) -> list[tuple]:
    """Rows of the Prefect database, read after its server is gone."""
    with sqlite3.connect(f"file:{home / 'prefect.db'}?mode=ro", uri=True) as con:
        return con.execute(sql).fetchall()
