"""A real PostgreSQL, of Debian's package `postgresql`, for the length of a test."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port
from tests.stages_for_tests import wait_for

PASSWORD = "geheim/17@x"
"""With characters that mean something in a URL."""


class Postgres:
    """A server on 127.0.0.1 with the user `ftpipe`. port; run(program, *words): a program of PostgreSQL with that user and password."""

    def __init__(self, programs: Path, folder: Path, who: dict[str, Any]):
        self.programs, self.folder, self.who, self.port = programs, folder, who, free_port()

    def run(self, program: str, *words: str, check: bool = True) -> subprocess.CompletedProcess:
        done = subprocess.run([self.programs / program, *words], capture_output=True, text=True, timeout=60, cwd=self.folder, **self.who,
                              env=os.environ | {"PGPASSWORD": PASSWORD, "PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": "ftpipe", "LC_ALL": "C"})
        assert not check or done.returncode == 0, done.stderr
        return done


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Start one in a folder of its own; skips the test where PostgreSQL is not installed. It refuses to run as root, so another user runs it then."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3])) or [Path(p) for p in [shutil.which("postgres")] if p]
    if not found:
        pytest.skip("PostgreSQL's server is not here; it is in Debian's package `postgresql`")
    who: dict[str, Any] = {}
    if os.geteuid() == 0:
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
        who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    folder = Path(tempfile.mkdtemp(prefix="ftpipe-postgres-"))
    process = None
    try:
        (folder / "password").write_text(PASSWORD + "\n")
        if who:
            for path in (folder, folder / "password"):
                os.chown(path, who["user"], who["group"])
        server = Postgres(found[-1].parent, folder, who)
        server.run("initdb", "--pgdata=data", "--username=ftpipe", "--pwfile=password", "--auth=scram-sha-256", "--encoding=UTF8", "--no-sync")
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([server.programs / "postgres", "-D", "data", "-h", "127.0.0.1", "-p", str(server.port), "-k", str(folder), "-F"],
                                       cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **who)
        wait_for(lambda: process.poll() is not None or not server.run("pg_isready", check=False).returncode, 60, what="PostgreSQL's start")
        assert process.poll() is None, (folder / "log").read_text()
        yield server
    finally:
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)  # a fast shutdown: it ends its connections
            process.wait(30)
        shutil.rmtree(folder)
