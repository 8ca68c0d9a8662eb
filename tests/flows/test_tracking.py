"""The MLflow listener: live, batched, joined to the store, and never in the way of a training."""

from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftpipe.pipeline import spec
from ftpipe.pipeline.runner import Run
from ftpipe.stages.base import Environment, Listener
from ftpipe.tracking import Listeners, MlflowListener, default_uri, flatten
from tests.stages_for_tests import CHAIN, write_pipeline

pytestmark = pytest.mark.timeout(120)


def go(folder: Path, listener_of, **training) -> tuple[Run, MlflowListener]:
    pipeline = spec.load(write_pipeline(folder, CHAIN | {"adapter": CHAIN["adapter"] | training}))
    listener = listener_of(pipeline)
    run = Run(pipeline, listener=listener)
    listener.run_id = run.id
    for name in run.order:
        run.execute(name)
    run.close()
    return run, listener


def of_pipeline(pipeline) -> MlflowListener:
    return MlflowListener(pipeline.env, stages=pipeline.stages, every=0)


def mlflow_runs(env: Environment):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=default_uri(env))
    experiment = client.get_experiment_by_name(env.pipeline)
    return client, client.search_runs([experiment.experiment_id]) if experiment else []


def test_metrics_parameters_and_keys_arrive(folder):
    run, _ = go(folder, of_pipeline, steps=5)
    client, (found,) = mlflow_runs(run.pipeline.env)
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(m.step, round(m.value, 6)) for m in history] == [(i, round(1 / i, 6)) for i in range(1, 6)]
    assert found.data.params == {"rows": "rows", "steps": "5", "pause": "0.0", "log_lines": "1"}
    tags = {k: v for k, v in found.data.tags.items() if k.startswith("ftpipe.")}
    assert tags == {"ftpipe.pipeline": "small", "ftpipe.stage": "adapter", "ftpipe.kind": "planted_training", "ftpipe.key": run.artifacts["adapter"].key,
                    "ftpipe.run": run.id}
    assert not (Path.cwd() / "mlruns").exists()

    again, _ = go(folder, of_pipeline, steps=5)
    assert again.record["stages"]["adapter"]["state"] == "reused" and len(mlflow_runs(run.pipeline.env)[1]) == 1


def test_settings_are_read_off_the_artifact_when_the_stages_are_not_given(folder):
    run, _ = go(folder, lambda p: MlflowListener(p.env), steps=3)
    (found,) = mlflow_runs(run.pipeline.env)[1]
    assert found.data.params["steps"] == "3"


def test_metrics_are_sent_while_the_stage_runs_and_in_batches(folder, monkeypatch):
    from mlflow.tracking import MlflowClient

    sizes: list[int] = []
    real = MlflowClient.log_batch

    def counted(self, run_id, metrics=(), params=(), **rest):
        if metrics:
            sizes.append(len(metrics))
        return real(self, run_id, metrics=metrics, params=params, **rest)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    run, _ = go(folder, lambda p: MlflowListener(p.env, stages=p.stages, every=0.3), steps=40, pause=0.02)
    assert sum(sizes) == 80 and 1 < len(sizes) < 20, sizes
    assert run.record["state"] == "succeeded"


def test_a_failed_stage_ends_its_mlflow_run(folder):
    pipeline = spec.load(write_pipeline(folder, CHAIN))
    listener = of_pipeline(pipeline)
    for error, status in ((ValueError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED")):
        listener.started("adapter", "planted_training", "k" * 64)
        listener.metrics("adapter", {"loss": 1.0}, 1)
        listener.failed("adapter", error)
        assert mlflow_runs(pipeline.env)[1][0].info.status == status


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////proc/no/such.db"])
def test_a_tracking_server_that_is_gone_is_said_once_and_stops_nothing(uri, folder, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def lost(pipeline):
        pipeline.env.tracking_uri = uri
        return of_pipeline(pipeline)

    with caplog.at_level(logging.WARNING, logger="ftpipe"):
        began = time.monotonic()
        run, _ = go(folder, lost, steps=30)
    assert run.record["state"] == "succeeded" and time.monotonic() - began < 30
    assert sum("no longer sent to MLflow" in r.message for r in caplog.records) == 1


def test_a_locked_database_is_waited_for(folder):
    pipeline = spec.load(write_pipeline(folder, CHAIN))
    listener = of_pipeline(pipeline)
    listener.started("adapter", "planted_training", "k" * 64)
    listener.metrics("adapter", {"loss": 1.0}, 1)
    locker = subprocess.Popen([sys.executable, "-c", f"""
import sqlite3, time
con = sqlite3.connect({str(pipeline.env.workspace / 'mlflow.db')!r}, isolation_level=None)
con.execute("begin exclusive"); print("locked", flush=True); time.sleep(7); con.execute("rollback")
"""], stdout=subprocess.PIPE)
    assert locker.stdout.readline() == b"locked\n"
    listener.metrics("adapter", {"loss": 0.5}, 2)
    locker.wait(30)
    assert not listener._broken
    client, (found,) = mlflow_runs(pipeline.env)
    assert [m.step for m in client.get_metric_history(found.info.run_id, "loss")] == [1, 2]
    with sqlite3.connect(pipeline.env.workspace / "mlflow.db") as con:
        assert con.execute("select count(*) from metrics").fetchone() == (2,)


def test_listeners_pass_everything_on_in_order():
    heard: list[tuple] = []

    class Ear(Listener):
        def __init__(self, name):
            self.name = name

        def started(self, *a):
            heard.append((self.name, "started", *a))

        def progress(self, *a):
            heard.append((self.name, "progress", *a))

        def metrics(self, *a):
            heard.append((self.name, "metrics", *a))

        def finished(self, name, artifact, reused):
            heard.append((self.name, "finished", name, artifact, reused))

        def failed(self, *a):
            heard.append((self.name, "failed", *a))

    both = Listeners([Ear("a"), Ear("b")])
    calls = {"started": ("s", "kind", "key"), "progress": ("s", 1, 2, "steps", {}), "metrics": ("s", {"loss": 1.0}, 3), "finished": ("s", None, True),
             "failed": ("s", None)}
    for name, arguments in calls.items():
        getattr(both, name)(*arguments)
    assert heard == [(who, name, *arguments) for name, arguments in calls.items() for who in "ab"]


def test_settings_are_flattened():
    assert flatten({"adapt": {"lora": {"r": 16, "targets": ["q", "v"]}}, "empty": {}, "seed": None}) == \
        {"adapt.lora.r": 16, "adapt.lora.targets": ["q", "v"], "empty": {}, "seed": None}


def test_the_library_does_not_import_prefect_and_tracking_does_not_import_mlflow():
    code = "import sys, ftpipe.tracking, ftpipe.pipeline.runner; print([m for m in ('prefect', 'mlflow', 'flows', 'tasks') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.strip() == "[]"
