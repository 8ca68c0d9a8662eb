"""The flow over small pipelines: what it runs, what it says, how it fails."""

from __future__ import annotations

import errno
import json
import logging
import threading
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import yaml

from ftpipe.errors import ConfigError, InfrastructureError, TrainingError
from ftpipe.pipeline import spec
from tests.stages_for_tests import CHAIN, wait_for, write_pipeline

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def flow(prefect_server, folder):
    from flows.data_to_model import data_to_model

    return data_to_model


def last_run(client, name: str = "data-to-model"):
    from prefect.client.schemas.filters import FlowFilter
    from prefect.client.schemas.sorting import FlowRunSort

    return client.read_flow_runs(flow_filter=FlowFilter(name={"any_": [name]}), sort=FlowRunSort.START_TIME_DESC, limit=1)[0]


def task_states(client, run) -> dict[str, str]:
    """State names of the run's tasks by name, once all are final (the server records them with a delay)."""
    from prefect.client.schemas.filters import FlowRunFilter

    def found():
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run.id]}))
        return tasks if tasks and all(t.state.is_final() for t in tasks) else None

    return {t.name: t.state.name for t in wait_for(found, 20, what="final task states")[0]}


def artifacts(client, run) -> dict[str, object]:
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    return {a.key: a for a in client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id])))}


def test_a_run_is_seen_whole_and_a_second_one_finds_nothing_to_do(flow, client, folder):
    config = write_pipeline(folder, CHAIN)
    first = flow(str(config))
    assert json.loads(json.dumps(first)) == first
    assert first["built"] == ["rows", "adapter", "page"] and first["state"] == "succeeded"
    run = last_run(client)
    assert run.name == f"small {first['run']}" and run.state.message == "3 of 3 stages ran"
    assert run.labels["ftpipe.run"] == first["run"] and "pipeline:small" in run.tags
    assert task_states(client, run) == {"rows": "Completed", "adapter": "Completed", "page": "Completed"}
    shown = artifacts(client, run)
    funnel = json.loads(shown["small-rows"].data)
    assert [(r["rows"], r["count"]) for r in funnel] == [("in", 4), ("kept", 3), ("dropped: comment", 1)]
    assert shown["small-adapter-progress"].data == 100 and "5 of 5 steps" in shown["small-adapter-progress"].description
    assert shown["small-adapter-progress"].task_run_id is not None
    assert "3 of 3 stages ran" in shown["small-run"].data and "3 of 4" in shown["small-run"].data
    assert "small-page-progress" not in shown

    second = flow(str(config))
    assert second["reused"] == ["rows", "adapter", "page"] and second["built"] == []
    run = last_run(client)
    assert run.state.is_completed() and run.state.message == "nothing to do: all 3 stages are up to date"
    assert set(task_states(client, run).values()) == {"Reused"}
    assert set(artifacts(client, run)) == {"small-run"}


def test_selection_force_and_overrides_arrive(flow, folder):
    config = str(write_pipeline(folder, CHAIN))
    assert flow(config, to="adapter")["built"] == ["rows", "adapter"]
    assert flow(config, only="page")["built"] == ["page"]
    assert flow(config, start="adapter", force=["adapter"])["built"] == ["adapter"]
    changed = flow(config, overrides={"stages.adapter.steps": 7})
    assert changed["built"] == ["adapter", "page"] and changed["reused"] == ["rows"]


def test_one_stage_alone(flow, client, folder):
    from flows.one_stage import one_stage

    config = str(write_pipeline(folder, CHAIN))
    with pytest.raises(ConfigError, match="adapter needs rows"):
        one_stage(config, "adapter")
    flow(config)
    assert one_stage(config, "adapter")["reused"] == ["adapter"]
    assert one_stage(config, "adapter", force=True)["built"] == ["adapter"]
    assert last_run(client, "one-stage").state.is_completed()


def test_what_may_pass_is_tried_again_and_the_rest_is_not(flow, client, folder, monkeypatch):
    from tasks import stage

    monkeypatch.setattr(stage.execute, "retry_delay_seconds", [0.1, 0.1, 0.1])
    done = flow(str(write_pipeline(folder / "a", {"shaky": {"kind": "flaky", "times": 2}})))
    assert done["built"] == ["shaky"] and done["state"] == "succeeded"
    record = json.loads((folder / "a" / "work" / "runs" / f"{done['run']}.json").read_text())
    assert record["state"] == "succeeded" and record["stages"]["shaky"]["state"] == "built"

    with pytest.raises(TrainingError, match="try 1 fails"):
        flow(str(write_pipeline(folder / "b", {"shaky": {"kind": "flaky", "retryable": False}})))
    run = last_run(client)
    assert run.state.is_failed() and "try 1 fails" in run.state.message and "-> try again" in run.state.message

    with pytest.raises(InfrastructureError, match="try 4 fails"):
        flow(str(write_pipeline(folder / "c", {"shaky": {"kind": "flaky", "times": 9}})))


def test_an_error_of_the_system_is_tried_again_after_a_pause_and_the_stage_resumes(flow, client, folder, monkeypatch):
    """Three tries fail, each in another way, each one step further; the fourth has only the last step left to do."""
    from tasks import stage
    from tests.stages_for_tests import PlantedTraining

    failures = [OSError(errno.ENOSPC, "No space left on device"), ConnectionResetError("planted"), OSError(errno.EADDRINUSE, "Address already in use")]
    steps: list[int] = []

    def interrupted(self, ctx):
        done = ctx.work / "step"
        first = int(done.read_text()) + 1 if done.exists() else 1
        for step in range(first, 5):
            steps.append(step)
            done.write_text(str(step))
            if failures:
                raise failures.pop(0)
        (ctx.out / "train.json").write_text("{}")

    monkeypatch.setattr(stage.execute, "retry_delay_seconds", [0.1, 0.1, 0.1])
    monkeypatch.setattr(PlantedTraining, "run", interrupted)
    assert flow(str(write_pipeline(folder, CHAIN)))["built"] == ["rows", "adapter", "page"]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("error", [FloatingPointError("the loss is nan"), MemoryError(), FileNotFoundError(2, "No such file"), ValueError("bad")], ids=repr)
def test_what_would_come_again_is_not_tried_again(error, flow, folder, monkeypatch):
    from tests.stages_for_tests import PlantedTraining

    tries: list[int] = []

    def failing(self, ctx):
        tries.append(1)
        raise error

    monkeypatch.setattr(PlantedTraining, "run", failing)
    with pytest.raises(type(error)):
        flow(str(write_pipeline(folder, CHAIN)))
    assert len(tries) == 1


def test_pauses_between_tries_grow():
    from tasks.stage import execute

    assert execute.retry_delay_seconds == [5, 10, 20] and execute.retry_jitter_factor > 0


def test_a_bad_configuration_fails_before_any_stage(flow, client, folder):
    with pytest.raises(ConfigError, match="planted_rowz"):
        flow(str(write_pipeline(folder, {"rows": {"kind": "planted_rowz"}})))
    assert last_run(client).state.is_failed()


def test_log_lines_arrive_at_a_bounded_rate(flow, client, folder):
    from flows.server import flush

    config = write_pipeline(folder, CHAIN)
    flow(str(config), overrides={"stages.adapter.steps": 20, "stages.adapter.log_lines": 50})
    flush()
    run = last_run(client)
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    lines = [line for offset in (0, 200, 400) for line in client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])), limit=200, offset=offset)]
    said = [line.message for line in lines]
    assert any("4 lines, 1 comments" in m for m in said) and "step 1 line 0" in said
    assert 100 < sum(m.startswith("step ") for m in said) < 300
    left_out = sum(int(m.split()[0]) for m in said if "lines are left out here" in m)
    assert left_out + sum(m.startswith("step ") for m in said) - 1000 in (0, 1)  # the stage's own last line may be among them
    assert any(m.startswith("page done in") for m in said)
    assert next(line for line in lines if line.message == "step 1 line 0").task_run_id is not None
    whole = next((folder / "work" / "store").glob("planted_training-*/log.txt")).read_text()
    assert whole.count(" step ") == 1000
    assert not logging.getLogger("ftpipe").handlers or all(type(h).__name__ != "PrefectLog" for h in logging.getLogger("ftpipe").handlers)


def test_a_ui_that_fails_does_not_fail_the_run(flow, client, folder, monkeypatch):
    import prefect.artifacts
    from prefect.client.orchestration import SyncPrefectClient

    def broken(*args, **kwargs):
        raise OSError("the server is gone")

    for name in ("create_table_artifact", "create_markdown_artifact"):
        monkeypatch.setattr(prefect.artifacts, name, broken)
    monkeypatch.setattr(SyncPrefectClient, "create_artifact", broken)
    assert flow(str(write_pipeline(folder, CHAIN)))["state"] == "succeeded"


def test_interrupting_marks_the_run_cancelled(flow, client, folder, monkeypatch):
    from prefect.exceptions import CancelledRun

    from tests.stages_for_tests import PlantedTraining

    def interrupted(self, ctx):
        raise KeyboardInterrupt

    monkeypatch.setattr(PlantedTraining, "run", interrupted)
    with pytest.raises(CancelledRun):
        flow(str(write_pipeline(folder, CHAIN)))
    run = last_run(client)
    assert run.state.is_cancelled() and task_states(client, run) == {"rows": "Completed", "adapter": "Crashed"}
    record, = [json.loads(p.read_text()) for p in (folder / "work" / "runs").glob("*.json")]
    assert record["state"] == "cancelled"


def test_runs_whose_process_is_gone_are_marked(client):
    """The tidying up after a kill -9: a dead process's run is marked, a living one's and another host's are left alone."""
    from prefect import flow
    from prefect.states import Running

    from flows.stale import labels, mark_crashed

    session = uuid.uuid4().hex

    @flow(name="data-to-model")
    def stand_in():
        pass

    def running(**changes):
        run = client.create_flow_run(stand_in, state=Running())
        client.update_flow_run_labels(run.id, labels() | {"ftpipe.session": session} | changes)
        return run.id

    dead = running(**{"ftpipe.pid": 2**22 - 3})
    reborn = running(**{"ftpipe.born": 1.0})
    mine, elsewhere, other = running(), running(**{"ftpipe.host": "elsewhere", "ftpipe.pid": 1}), running(**{"ftpipe.session": "x", "ftpipe.pid": 2**22 - 3})
    assert mark_crashed(session=session) == 1
    states = {i: client.read_flow_run(i).state.type.value for i in (dead, reborn, mine, elsewhere, other)}
    assert list(states.values()) == ["CRASHED", "CRASHED", "RUNNING", "RUNNING", "RUNNING"]
    for run in (mine, elsewhere, other):
        client.delete_flow_run(run)


@pytest.fixture
def received():
    """A receiver of web hooks: its address, and what it was told."""
    told: list[dict] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *a):
            pass

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", told
    server.shutdown()


def with_notify(folder, name, stages, targets):
    path = write_pipeline(folder, stages, name=name)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"notify": targets}))
    return str(path)


def test_failures_and_refusals_are_told_once_and_good_runs_are_not(client, folder, received):
    from prefect import tags
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    from flows import notify
    from flows.data_to_model import data_to_model

    url, told = received
    CustomWebhookNotificationBlock(name="ops", url=url, json_data={"subject": "{{subject}}", "body": "{{body}}"}).save("ops", overwrite=True)
    target = ["custom-webhook/ops"]
    gate = with_notify(folder / "gate", "gated", {"judged": {"kind": "planted_verdict", "passes": True}}, target)
    assert data_to_model(gate)["verdict"] == "passed"
    (made,) = client.read_automations_by_name("ftpipe: gated")

    data_to_model(gate, overrides={"stages.judged.passes": False})
    wait_for(lambda: told, 20, what="the refusal")
    assert told[0]["subject"] == "ftpipe: the gate refused a candidate" and told[0]["body"].startswith("gated 2") and "refused" in told[0]["body"]
    data_to_model(gate, overrides={"stages.judged.passes": False})  # nothing new was judged

    failing = with_notify(folder / "fail", "failing", {"shaky": {"kind": "flaky", "retryable": False}}, target)
    with pytest.raises(TrainingError), tags(notify.tag("failing")):  # as `flows.run` and deployments have it
        data_to_model(failing)
    wait_for(lambda: len(told) > 1, 20, what="the failure")
    assert told[1]["subject"] == "ftpipe: run Failed" and told[1]["body"].startswith("failing 2") and "try 1 fails" in told[1]["body"]
    assert len(told) == 2

    assert client.read_automations_by_name("ftpipe: gated") == [made], "one automation, left alone while `notify` stays"
    notify.automate(client, "gated", [])
    assert client.read_automations_by_name("ftpipe: gated") == []
    notify.automate(client, "failing", [])


def test_a_block_that_is_not_there_stops_serving_but_no_run(client, folder):
    from flows import notify
    from flows.data_to_model import data_to_model

    with pytest.raises(ConfigError, match="no block slack-webhook/nobody") as caught:
        notify.automate(client, "small", ["slack-webhook/nobody"])
    assert caught.value.where == "notify" and client.read_automations_by_name("ftpipe: small") == []
    done = data_to_model(with_notify(folder, "small", {"judged": {"kind": "planted_verdict", "passes": True}}, ["slack-webhook/nobody"]))
    assert done["state"] == "succeeded"


@pytest.mark.parametrize("wrong", ["team", "https://hooks.slack.com/services/T/B/x", "slack-webhook/"])
def test_notify_names_blocks_and_nothing_else(wrong, folder):
    with pytest.raises(ConfigError, match="names no Prefect block"):
        spec.load(with_notify(folder, "small", {"judged": {"kind": "planted_verdict"}}, [wrong]))
