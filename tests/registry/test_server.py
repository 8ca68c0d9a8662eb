"""A registry on a server that two workspaces share."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from ftpipe.registry import ledger, server, versions
from ftpipe.stages.base import Environment
from tests.ports import free_port
from tests.registry.helpers import content, registered


@pytest.fixture
def url(tmp_path: Path, mlflow_tables: Path):
    shutil.copyfile(mlflow_tables, tmp_path / "s.db")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path}/s.db", "--artifacts-destination", str(tmp_path / "art"),
               "--serve-artifacts", "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=tmp_path)
    try:
        for _ in range(720):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
                break
            except OSError:
                assert process.poll() is None, "the server did not start"
                time.sleep(0.25)
        else:
            pytest.fail("the server does not answer after three minutes")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.e2e
def test_two_workspaces_share_versions_files_and_the_champion(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "started-in").mkdir()
    monkeypatch.chdir(tmp_path / "started-in")
    one, two = (Environment(tmp_path / n, tmp_path / n, "demo", tracking_uri=url) for n in ("one", "two"))
    assert registered(one, 1).moved and registered(one, 1).version == 1
    late = registered(two, 2)
    assert (late.version, late.moved) == (2, False), "the other workspace's champion was not what it had been compared with"
    assert ledger.champion(two, "demo")["content"] == content(one, 1)
    folder = versions.load_version(two, "demo", "champion")
    assert versions.verify(two, "demo", "champion") == [] and folder.is_relative_to(two.workspace)
    assert registered(two, 2, beat=content(one, 1)).moved
    assert server.model_aliases(server.client(one), "demo") == {"champion": 2, "previous": 1}
    assert not list((tmp_path / "started-in").iterdir()), "nothing is written where the command was started"
