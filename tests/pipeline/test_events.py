"""The structured log of a run, and the space it takes."""

from __future__ import annotations

import json

import pytest

from ftpipe.pipeline import runner, spec
from ftpipe.pipeline.events import FILE
from ftpipe.pipeline.garbage import of_run, used
from ftpipe.stages.base import Stage


def lines(run: runner.Run) -> list[dict]:
    path = run.store.workspace / "logs" / run.id / FILE
    return [json.loads(line) for line in path.read_text().splitlines()]


def go(force=()) -> runner.Run:
    pipeline = spec.load("pipeline.yaml")
    return runner.run(pipeline, selection=runner.Selection.of(pipeline, force=force))


def test_every_line_says_run_and_stage_and_rows_are_counted(project):
    run = go()
    found = lines(run)
    assert {line["run"] for line in found} == {run.id} and {line["pipeline"] for line in found} == {"demo"} and all(line["time"] for line in found)
    assert (found[0]["event"], found[0]["state"]) == ("run", "started") and found[0]["stages"] == run.order
    assert (found[-1]["event"], found[-1]["state"]) == ("run", "succeeded")
    built = {line["stage"]: line for line in found if line["event"] == "stage" and line["state"] == "built"}
    assert list(built) == run.order
    for name, line in built.items():
        assert line["counts"] == run.artifacts[name].counts and line["key"] == run.artifacts[name].key and line["seconds"] >= 0
    assert any(line["counts"].get("rows_in") for line in built.values())
    said = [line for line in found if line["event"] == "log" and line["stage"] == "big"]
    assert said[0]["level"] == "INFO" and said[0]["message"].startswith("big (above) starts") and said[-1]["message"].startswith("big done in")
    again = lines(go())
    assert {line["state"] for line in again if line["event"] == "stage"} == {"reused"}


def test_a_failure_is_a_line(project, monkeypatch):
    monkeypatch.setattr(next(c for c in Stage.__subclasses__() if c.name() == "sum"), "run", lambda self, ctx: 1 / 0)
    pipeline = spec.load("pipeline.yaml")
    run = runner.Run(pipeline)
    with pytest.raises(ZeroDivisionError):
        [run.execute(name) for name in run.order]
    failed, ended = lines(run)[-2:]
    assert (failed["event"], failed["stage"], failed["state"], failed["error"]) == ("stage", run.order[-1], "failed", "division by zero")
    assert (ended["event"], ended["state"]) == ("run", "failed")


def test_space_is_counted_for_the_run_that_took_it(project):
    first = go()
    whole = of_run(first.store.workspace, first.record)
    assert whole == {name: used(a.path) for name, a in first.artifacts.items()} and all(whole.values())
    second = go(force=["total"])
    assert set(of_run(second.store.workspace, second.record)) == {"total"}
    assert set(of_run(first.store.workspace, first.record)) == set(whole) - {"total"}, "what was made anew belongs to the run that made it"
