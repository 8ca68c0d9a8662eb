"""The whole chain on a tiny model through `ftpipe run`: what Prefect and MLflow hold afterwards, and real training ranks that are interrupted."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.chain import last_run, make_project
from tests.flows.real_server import environment, ftpipe, interrupt, query
from tests.stages_for_tests import alive, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
QUIET = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = make_project(tmp_path_factory.mktemp("chain"))
    (folder / "prefect").mkdir()
    return folder, environment(folder / "prefect", QUIET)


def run(project, *words: str, timeout: float = 600) -> str:
    folder, env = project
    log = folder / f"run-{time.monotonic_ns()}.log"
    with ftpipe(["run", "pipeline.yaml", *words], env, log) as process:
        status = process.wait(timeout)
    assert status == 0, log.read_text()
    return log.read_text()


def test_everything_is_shown_and_joined(project):
    folder, _ = project
    run(project)
    home, record = folder / "prefect", last_run(folder)
    (name, state, message), = query(home, "select f.name, f.state_type, s.message from flow_run f join flow_run_state s on s.id = f.state_id")
    assert (name, state) == (f"chain {record['id']}", "COMPLETED") and "registered as chain:1" in message
    assert {n for n, in query(home, "select name from task_run where state_name = 'Completed'")} == set(record["stages"])
    shown = dict(query(home, "select key, data from artifact"))
    assert "## Passed" in shown["chain-gate"] and "chain version 1" in shown["chain-register"] and "report.html" in shown["chain-report"]
    assert any(row["better"] == "adapter" for row in json.loads(json.loads(shown["chain-evaluate"])))
    assert {"chain-ingest", "chain-ingest-quarantine", "chain-pool-minhash", "chain-adapter", "chain-adapter-progress", "chain-run"} <= set(shown)
    funnel = json.loads(json.loads(shown["chain-pool-exact-dedup"]))
    assert funnel[0]["count"] == funnel[1]["count"] + sum(r["count"] for r in funnel[2:]) and len(funnel) > 2

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / '.ftpipe' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("chain").experiment_id])
    tracked = {r.data.tags["ftpipe.stage"]: r for r in runs if "ftpipe.stage" in r.data.tags}
    assert {"reference", "adapter", "random"} <= set(tracked)
    assert tracked["adapter"].data.tags["ftpipe.key"] == record["stages"]["adapter"]["key"] and tracked["adapter"].data.params["learning_rate"] == "0.03"
    losses = client.get_metric_history(tracked["adapter"].info.run_id, "loss")
    assert len(losses) > 2 and losses[-1].value < losses[0].value

    began = time.monotonic()
    assert "nothing to do" in run(project)
    print(f"second run, server and all: {time.monotonic() - began:.1f} s")
    last = "(select id from flow_run order by start_time desc limit 1)"
    assert {s for s, in query(home, f"select state_name from task_run where flow_run_id = {last}")} == {"Reused"}


def test_ctrl_c_ends_real_training_ranks(project):
    folder, env = project
    words = ["run", "pipeline.yaml", "--to", "adapter", "--set", "stages.adapter.ranks=2", "--set", "stages.adapter.epochs=500"]
    log = folder / "interrupted.log"
    with ftpipe(words, env, log) as process:
        def ranks():
            return [p.pid for p in psutil.Process(process.pid).children(recursive=True) if "ftpipe.train.rank" in " ".join(p.cmdline())]

        def training() -> bool:
            shown = query(folder / "prefect", "select key from artifact where created > datetime('now', '-60 seconds')")
            return len(ranks()) == 2 and ("chain-adapter-progress",) in shown

        wait_for(lambda: process.poll() is not None or training(), 300, what="the training's progress")
        assert process.poll() is None, log.read_text()
        everyone = [process.pid, *(p.pid for p in psutil.Process(process.pid).children(recursive=True))]
        interrupt(process)
        _, seconds = wait_for(lambda: not alive(everyone), 20, what="the end of every process")
        print(f"ctrl-C while 2 ranks train: nothing left after {seconds:.1f} s")
        assert process.returncode == 130 or process.wait() == 130
    assert last_run(folder)["state"] == "cancelled"
    (state,), = query(folder / "prefect", "select state_type from flow_run order by start_time desc limit 1")
    assert state == "CANCELLED"
