"""A pipeline on a schedule, through a real server and runner."""

from __future__ import annotations

import json
import time

import httpx
import pytest

from tests.flows.browser import look
from tests.flows.real_server import environment, ftpipe, query, serving
from tests.ports import free_port
from tests.stages_for_tests import CHAIN, stop, wait_for, write_pipeline

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def test_scheduled_runs_build_once_and_then_find_nothing_to_do(server, kinds, tmp_path):
    api, home = server
    config = write_pipeline(tmp_path, CHAIN, name="nightly")
    env = environment(home, kinds)
    with serving(config, api, env, "--every", "12") as (process, deployment):
        first, seconds = wait_for(lambda: api.runs(deployment, "COMPLETED"), 240, what="a finished run")
        print(f"first scheduled run finished after {seconds:.1f} s")
        run = first[0]
        assert run["auto_scheduled"] and run["name"].startswith("nightly ")
        assert "3 of 3 stages ran" in run["state"]["message"]
        assert {t["name"]: t["state"]["name"] for t in _settled(api, run["id"])} == {"rows": "Completed", "adapter": "Completed", "page": "Completed"}
        keys = {a["key"]: a["type"] for a in api.artifacts(run["id"])}
        assert keys["nightly-rows"] == "table" and keys["nightly-adapter-progress"] == "progress" and keys["nightly-run"] == "markdown"
        wait_for(lambda: any("4 lines, 1 comments" in m for m in api.logs(run["id"])), 20, what="the stage's log line in Prefect")

        done, _ = wait_for(lambda: len(r := api.runs(deployment, "COMPLETED")) > 1 and r, 240, what="a second run")
        second = done[1]
        print(f"second run: {second['total_run_time']:.1f} s; {second['state']['message']}")
        assert second["state"]["message"] == "nothing to do: all 3 stages are up to date"
        assert {t["state"]["name"] for t in _settled(api, second["id"])} == {"Reused"}

        found = api.deployment("nightly")
        assert found["schedules"][0]["active"] and not found["paused"] and found["schedules"][0]["schedule"]["interval"] == 12
        assert found["entrypoint"] == "flows.data_to_model.data_to_model" and found["global_concurrency_limit"]["limit"] == 1
        assert found["parameters"]["config"] == str(config) and found["parameters"]["overrides"] == {"workspace": str(tmp_path / "work")}
        assert api.runs(deployment, "SCHEDULED"), "the next runs are not listed"
        ui = api.url.removesuffix("/api")
        look(f"{ui}/runs/flow-run/{second['id']}", [second["name"], "Completed", "nothing to do: all 3 stages are up to date"], picture=tmp_path / "run.png")
        table = next(a for a in api.artifacts(run["id"]) if a["key"] == "nightly-rows")
        look(f"{ui}/artifacts/artifact/{table['id']}", ["nightly-rows", *json.loads(table["data"])[0]])
        coming = api.runs(deployment, "SCHEDULED")[:6][-1]  # not the very next: it may have begun before the page is drawn
        look(f"{ui}/deployments/deployment/{deployment}?tab=Upcoming", ["nightly", "Every 12 seconds", coming["name"]], picture=tmp_path / "schedule.png")
        wait_for(lambda: api.runs(deployment, "PENDING"), 60, what="a run that is taken on and has not begun")
        process.terminate()
        assert process.wait(40) == 0
    wait_for(lambda: not api.runs(deployment, "PENDING", "RUNNING"), 20, what="the end of the run that nobody executes any more")
    assert not api.deployment("nightly")["schedules"][0]["active"] or api.deployment("nightly")["paused"]
    before = len(api.runs(deployment, "COMPLETED"))
    taken = api.start(deployment)  # a run of a runner that was killed before it began: it holds the deployment's only place
    wait_for(lambda: api.post(f"/flow_runs/{taken}/set_state", {"state": {"type": "PENDING"}})["status"] == "ACCEPT", 60, what="a free place")
    with serving(config, api, env, "--every", "5", "--catch-up"):
        wait_for(lambda: [r for r in api.runs(deployment) if not r["auto_scheduled"]], 60, what="the run that makes up for those missed meanwhile")
        wait_for(lambda: len(api.runs(deployment, "COMPLETED")) > before, 240, what="its end")
        assert api.run(taken)["state"]["type"] == "CRASHED"
    with serving(config, api, env, "--cron", "0 3 * * *") as (_, again):
        found = api.deployment("nightly")
        assert again == deployment and not found["paused"]
        assert [(s["active"], s["schedule"]["cron"], s["schedule"]["timezone"]) for s in found["schedules"]] == [(True, "0 3 * * *", "UTC")]
        waiting, _ = wait_for(lambda: api.runs(deployment, "SCHEDULED"), 30, what="the next run")
        assert all(r["expected_start_time"][11:16] == "03:00" for r in waiting)


def _settled(api, run: str):
    """The task runs of a finished flow run; the server takes a moment to record how they ended."""
    return wait_for(lambda: (t := api.tasks(run)) and all(x["state"]["type"] == "COMPLETED" for x in t) and t, 30, what="the end of the task runs")[0]


def test_a_second_run_waits_for_the_first(server, kinds, tmp_path):
    api, home = server
    config = write_pipeline(tmp_path, {"rows": CHAIN["rows"], "adapter": CHAIN["adapter"] | {"steps": 16, "pause": 0.5}}, name="busy")
    with serving(config, api, environment(home, kinds)) as (process, deployment):
        ids = [api.start(deployment), api.start(deployment)]
        most = 0
        end = time.monotonic() + 90
        while time.monotonic() < end and not all(api.run(i)["state"]["type"] == "COMPLETED" for i in ids):
            most = max(most, len(api.runs(deployment, "RUNNING")))
            time.sleep(0.5)
        states = [api.run(i)["state"] for i in ids]
        assert [s["type"] for s in states] == ["COMPLETED", "COMPLETED"] and most == 1
        assert sorted("nothing to do" in s["message"] for s in states) == [False, True]
        taken = api.start(deployment, after="2100-01-01T00:00:00Z")
        api.post(f"/flow_runs/{taken}/set_state", {"state": {"type": "PENDING"}, "force": True})
        process.terminate()
        assert process.wait(40) == 0
        assert "ended before this run began" in api.run(taken)["state"]["message"], "a stopped runner leaves a run that holds the deployment's only place"


def test_commands_without_a_server_bring_one_each(kinds, tmp_path):
    """`serve` and `run` share one Prefect database, as one user's commands do, and neither depends on the other's server."""
    home = tmp_path / "prefect"
    home.mkdir()
    env, log = environment(home, kinds), tmp_path / "serve.log"
    config = write_pipeline(tmp_path / "a", CHAIN, name="own")
    long = write_pipeline(tmp_path / "b", {"rows": CHAIN["rows"], "adapter": CHAIN["adapter"] | {"steps": 20, "pause": 0.5}}, name="long")
    with ftpipe(["serve", str(config), "--every", "10"], env, log) as process, ftpipe(["run", str(long)], env, tmp_path / "run.log") as run:
        wait_for(lambda: process.poll() is not None or "is served" in log.read_text(), 180, what="the runner")
        assert process.poll() is None, log.read_text()
        ui = next(line for line in log.read_text().splitlines() if "/deployments/deployment/" in line)
        assert httpx.get(ui, headers={"accept": "text/html"}, follow_redirects=True).status_code == 200
        wait_for(lambda: query(home, "select 1 from flow_run where state_type = 'COMPLETED' and name like 'own%'"), 240, what="a finished run")
        stop(process)
        assert process.returncode == 0, log.read_text()[-2000:]
        wait_for(lambda: not _answers(ui), 20, what="the end of the server")
        assert run.wait(150) == 0, (tmp_path / "run.log").read_text()
    assert query(home, "select state_type from flow_run where name like 'long%'") == [("COMPLETED",)]


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code < 500
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize("arguments, url, words, status", [
    (["--cron", "0 25 * * *"], None, ["is no cron expression", "five fields"], 2),
    (["--cron", "0 3 * * *", "--timezone", "Europe/Berlinn"], None, ["no time zone", "Europe/Berlin"], 2),
    (["--cron", "0 3 * * *"], "http://127.0.0.1:{port}/api", ["does not answer", "then try again"], 1),
])
def test_serve_says_what_is_wrong(arguments, url, words, status, kinds, tmp_path):
    config, log = write_pipeline(tmp_path, CHAIN), tmp_path / "serve.log"
    env = environment(tmp_path, kinds) | ({"PREFECT_API_URL": url.format(port=free_port())} if url else {})
    with ftpipe(["serve", str(config), *arguments], env, log) as process:
        assert process.wait(60) == status
    said = log.read_text()
    assert all(w in said for w in words) and "Traceback" not in said, said
