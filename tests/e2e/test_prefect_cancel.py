"""However a run is stopped, no child of it outlives it by more than 20 seconds, and its state in Prefect is true."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from ftpipe.pipeline.runner import runs
from tasks.publish import slug
from tests.flows.real_server import Api, environment, ftpipe, pids, query, serving
from tests.stages_for_tests import alive, stop, wait_for, write_pipeline

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
LIMIT = 20.0


def ranks_pipeline(folder: Path, name: str, **settings) -> Path:
    return write_pipeline(folder, {"hang": {"kind": "ranks", **settings}}, name=name)


def started(api: Api, deployment: str, workspace: Path) -> tuple[str, dict]:
    """A flow run whose ranks are up."""
    run = api.start(deployment)
    found, _ = wait_for(lambda: pids(workspace), 90, what="the start of the ranks")
    assert len(alive(found["ranks"])) == 2
    return run, found


def ended(found: dict, *, flow: bool = True) -> float:
    """Seconds until no rank (and no flow process) is left."""
    everyone = found["ranks"] + ([found["flow"]] if flow else [])
    _, seconds = wait_for(lambda: not alive(everyone), LIMIT, what=f"the end of {everyone}")
    return seconds


@pytest.mark.parametrize("way", ["cancel in the UI", "kill -9 of the flow", "kill -9 of serve", "SIGTERM to serve"])
def test_stopping_a_served_run(way, server, kinds, tmp_path, record_property):
    api, home = server
    # Without the ranks' own tie to the flow, only a flow that unwinds ends them; a flow killed with -9 cannot unwind.
    config = ranks_pipeline(tmp_path, slug(way), tied=way == "kill -9 of the flow")
    workspace = tmp_path / "work"
    with serving(config, api, environment(home, kinds), background=way == "SIGTERM to serve") as (serve, deployment):
        run, found = started(api, deployment, workspace)
        assert found["parent"] == serve.pid
        began = time.monotonic()
        if way == "cancel in the UI":
            api.post(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
        elif way == "kill -9 of the flow":
            os.kill(found["flow"], signal.SIGKILL)
        elif way == "kill -9 of serve":
            serve.kill()
        else:
            serve.terminate()
        seconds = ended(found)
        state, _ = wait_for(lambda: (s := api.run(run)["state"])["type"] in ("CANCELLED", "CRASHED") and s, 40, what="a final state")
        print(f"{way}: no live process after {seconds:.1f} s, state {state['name']} after {time.monotonic() - began:.1f} s: {state['message']}")
        record_property("seconds", seconds)
        wanted = {"cancel in the UI": ["CANCELLED"], "kill -9 of the flow": ["CRASHED"], "kill -9 of serve": ["CRASHED"]}
        assert state["type"] in wanted.get(way, ["CANCELLED", "CRASHED"])
        if way != "kill -9 of the flow":
            assert (workspace / "unwound").exists()
            assert runs(workspace)[0]["state"] == "cancelled"
        else:
            assert runs(workspace)[0]["state"] == "killed"
        if way == "SIGTERM to serve":
            wait_for(lambda: serve.poll() is not None, 60, what="the end of ftpipe serve")
        else:
            assert (serve.poll() is None) == (way != "kill -9 of serve")
        stop(serve)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(config) in " ".join(p.info["cmdline"] or [])]


def test_kill_9_of_ftpipe_run_with_its_own_server(kinds, tmp_path):
    """Ctrl-C is tried with real training ranks, in test_chain.py."""
    home = tmp_path / "prefect"
    home.mkdir()
    config, workspace = ranks_pipeline(tmp_path, "alone", tied=True), tmp_path / "work"
    with ftpipe(["run", str(config)], environment(home, kinds), tmp_path / "run.log") as process:
        found, seconds = wait_for(lambda: process.poll() is not None or pids(workspace), 120, what="the start of the ranks")
        assert process.poll() is None, (tmp_path / "run.log").read_text()
        beside = [p.pid for p in psutil.process_iter(["cmdline"]) if "flows.guardian" in (p.info["cmdline"] or []) and str(home) in " ".join(p.info["cmdline"])]
        assert len(beside) == 1
        beside += [p.pid for p in psutil.Process(beside[0]).children(recursive=True)]
        process.kill()
        seconds = ended(found, flow=False)
        wait_for(lambda: process.poll() is not None, LIMIT, what="the end of ftpipe run")
        _, after = wait_for(lambda: not alive(beside), LIMIT, what="the end of the local server")
        print(f"no rank after {seconds:.1f} s; no local server {after:.1f} s later")
    (state, message), = query(home, "select f.state_type, s.message from flow_run f join flow_run_state s on s.id = f.state_id")
    assert state == "CRASHED", message
    assert not query(home, "select name from task_run where state_type in ('RUNNING', 'PENDING')")
    assert runs(workspace)[0]["state"] == "killed"
