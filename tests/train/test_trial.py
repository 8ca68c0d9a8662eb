"""Seconds of training: planted costs give the number of steps, and what is trained is what so many steps train."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from ftpipe.train import outcome, trial
from ftpipe.train.launch import Enough
from tests.train import planted


@pytest.mark.parametrize("cost", [(0.5, 0.0), (0.0, 0.002), (0.2, 0.001)])
def test_planted_costs_of_steps_and_tokens_are_found_and_fill_the_seconds(cost):
    rng = np.random.default_rng(0)
    sizes = rng.integers(50, 500, 400)
    took = [cost[0] + cost[1] * t for t in sizes]
    found = trial.price(list(zip(sizes[:20], took[:20])))
    assert found == pytest.approx(cost, abs=1e-9)
    n, expected = trial.fitting(60, sizes, found)
    assert expected == pytest.approx(sum(took[:n])) and sum(took[:n]) <= 60 < sum(took[: n + 1])
    assert trial.fitting(1e-6, sizes, found)[0] == 1, "one step is always taken"


def test_a_slow_step_counts_in_the_sum():
    measured = [(100, 1.0)] * 9 + [(100, 11.0)]
    a, b = trial.price(measured)
    assert sum(a + b * t for t, _ in measured) == pytest.approx(20)


def test_a_trial_ends_when_it_knows_enough_and_does_not_count_the_first_step():
    def told(seconds: list[float], enough: float, limit: float) -> trial.Measured:
        measured = trial.Measured(enough, limit)
        measured({"event": "ready", "start": 0})
        with pytest.raises(Enough):
            for s in seconds:
                measured({"event": "step", "tokens": 10, "seconds": s})
        return measured

    measured = told([5.0] + [0.125] * 50, 1.25, 100)
    assert len(measured.steps) == 11 and trial.price(measured.counted())[0] + 10 * trial.price(measured.counted())[1] == pytest.approx(0.125)
    assert len(told([0.1] * 50, 0.05, 100).steps) == trial.LEAST
    assert len(told([30.0] * 50, 6, 60).steps) == 2, "a trial is not longer than the training"


@pytest.mark.e2e
def test_seconds_train_to_the_bytes_of_so_many_steps(tiny_model, tmp_path, monkeypatch):
    folder, told = tmp_path / "timed", planted.Told()
    ctx = planted.train(folder, tiny_model, listener=told, seconds=1.5)
    kept = json.loads((folder / "work" / trial.FILE).read_text())
    steps = kept["steps"]
    assert ctx.notes["budget"] == kept and kept["seconds"] == 1.5 and not (folder / "work" / "trial" / "result").exists()
    assert [s["step"] for s in told.steps] == list(range(1, steps + 1)) and steps > 3, "the trial's steps are nobody's"
    assert ctx.notes["step_seconds"] == pytest.approx(sum(s["seconds"] for s in told.steps)) and 0.1 < ctx.notes["step_seconds"] < 15
    assert told.steps[-1]["learning_rate"] < 0.3 * max(s["learning_rate"] for s in told.steps), "the schedule ends when the training does"
    straight = planted.train(tmp_path / "straight", tiny_model, steps=steps)
    assert {n: h for n, h in planted.payload(ctx).items() if n != "train.json"} == {n: h for n, h in planted.payload(straight).items() if n != "train.json"}
    summaries = [json.loads((c.out / "train.json").read_text()) for c in (ctx, straight)]
    ends = [s.pop("settings") for s in summaries]
    assert summaries[0] == summaries[1] and (ends[0]["seconds"], ends[0]["steps"], ends[1]["steps"]) == (1.5, None, steps)
    monkeypatch.setattr(trial, "launch", lambda *a, **k: pytest.fail("a run that goes on keeps the number that was found"))
    assert trial.steps_within(1.5, None, ctx, lambda: None) == kept


def test_the_timing_of_steps_outlives_a_kill(tmp_path):
    def heard(*events: tuple[int, float]) -> outcome.Heard:
        found = outcome.Heard(SimpleNamespace(work=tmp_path, listener=planted.Told(), log=planted.log, name="a", progress=lambda *a, **k: None))
        for step, seconds in events:
            found({"event": "step", "step": step, "of": 4, "time": 0, "seconds": seconds, "loss": 1, "learning_rate": 0, "grad_norm": 0,
                   "tokens_per_second": 9, "memory_bytes": 9})
        return found

    heard((1, 0.5), (2, 0.5), (3, 0.5))
    with (tmp_path / outcome.TIMING).open("a") as f:
        f.write('{"step": 4, "seco')
    assert [(t["step"], t["seconds"]) for t in heard((3, 0.25), (4, 0.75)).timing] == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.75)]


def test_seconds_are_one_end_among_others():
    with pytest.raises(ValueError, match="epochs, steps, tokens and seconds, not steps and seconds"):
        planted.stage("m", steps=3, seconds=3)
    assert planted.stage("m", seconds=3).key_fields() != planted.stage("m", seconds=4).key_fields()
