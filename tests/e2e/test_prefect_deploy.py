"""deploy/prefect.yaml with a process work pool and a worker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.flows.real_server import environment
from tests.stages_for_tests import CHAIN, stop, wait_for, write_pipeline

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
FILE = Path(__file__).parents[2] / "deploy" / "prefect.yaml"


def test_a_worker_runs_the_deployment(server, kinds, tmp_path):
    api, home = server
    project = tmp_path / "project"
    write_pipeline(project, CHAIN)
    wanted = yaml.safe_load(FILE.read_text())
    wanted["deployments"][0]["parameters"]["config"] = "small.yaml"
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(wanted))
    env = environment(home, kinds) | {"PREFECT_API_URL": api.url, "PREFECT_WORKER_QUERY_SECONDS": "2"}

    def prefect(*words: str) -> None:
        done = subprocess.run([sys.executable, "-m", "prefect", "--no-prompt", *words], env=env, cwd=project, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    prefect("work-pool", "create", "ftpipe", "--type", "process")
    prefect("deploy", "--all", "--prefect-file", str(tmp_path / "prefect.yaml"))
    found = api.deployment("quickstart")
    assert found["work_pool_name"] == "ftpipe" and found["schedules"][0]["schedule"]["cron"] == "0 3 * * *"
    log = tmp_path / "worker.log"
    with log.open("wb") as out:
        worker = subprocess.Popen([sys.executable, "-m", "prefect", "worker", "start", "--pool", "ftpipe", "--type", "process"], env=env, cwd=tmp_path,
                                  stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        run = api.start(found["id"])
        state, _ = wait_for(lambda: (s := api.run(run)["state"])["type"] in ("COMPLETED", "FAILED", "CRASHED") and s, 120, what="the end of the run")
        assert state["type"] == "COMPLETED" and "3 of 3 stages ran" in state["message"], f"{state}\n{log.read_text()}"
        assert (project / "work" / "store").is_dir()
    finally:
        stop(worker)
