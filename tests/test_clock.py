"""The clock is set while things run, by hours, as a machine that wakes up or asks a time server does."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows import stale
from ftpipe.pipeline.runner import runs
from ftpipe.processes import born, clean, lives, remember
from ftpipe.train.lifeline import Reporter
from ftpipe.train.supervise import Child, Supervisor

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process's start is only known as a time of day")


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch):
    """Calling it sets the clock by so many seconds, as Python and psutil see it: what psutil calls the time of a process's start moves along."""
    real, boot = time.time, getattr(psutil, "_pslinux", psutil).boot_time

    def by(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: real() + seconds)
        monkeypatch.setattr(getattr(psutil, "_pslinux", psutil), "boot_time", lambda: boot() + seconds)

    return by


@needs_linux
@pytest.mark.parametrize("seconds", [3600, -3600])
def test_a_run_that_goes_on_is_not_taken_for_a_dead_one(set_clock, tmp_path, seconds):
    told, before = stale.labels(), psutil.Process().create_time()
    record = {"state": "running", "host": socket.gethostname(), "pid": os.getpid(), "born": born(os.getpid())}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "20260101-000000-aaaa.json").write_text(json.dumps(record))
    set_clock(seconds)
    assert abs(psutil.Process().create_time() - before - seconds) < 5, "the clock was not set"
    assert stale.alive(told) and runs(tmp_path)[0]["state"] == "running"


@needs_linux
def test_what_a_killed_parent_left_is_found_and_nobody_else(set_clock, tmp_path):
    sleepers = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True) for _ in range(2)]
    try:
        left, other = sleepers
        remember(tmp_path / "ranks.json", {"rank 0": left.pid})
        set_clock(-7200)
        assert clean(tmp_path / "ranks.json") == [left.pid] and lives(other.pid, born(other.pid))
    finally:
        for process in sleepers:
            process.kill()
            process.wait()


def test_a_number_that_was_given_to_another_process_is_not_the_run(tmp_path):
    """After a restart of the machine somebody else has the number of the run that it ended."""
    (tmp_path / "runs").mkdir()
    record = {"state": "running", "host": socket.gethostname(), "pid": os.getpid(), "born": "12345@another-boot"}
    (tmp_path / "runs" / "20260101-000000-aaaa.json").write_text(json.dumps(record))
    assert runs(tmp_path)[0]["state"] == "killed"
    assert not stale.alive(stale.labels() | {"ftpipe.born": "12345@another-boot"})


def test_the_first_to_fail_stays_the_first(set_clock, tmp_path):
    for name in ("first", "second"):
        Reporter(tmp_path / name)("failed", kind="TrainingError", what=f"the {name}", where=None, remedy=None)
        set_clock(-3600)
    failed = [Child(name, None, tmp_path / "o", tmp_path / name) for name in ("second", "first")]
    with pytest.raises(Exception, match="the first"):
        Supervisor(failed, 60, lambda child, event: None).wait()


def test_a_silent_rank_is_no_more_and_no_less_silent(set_clock, tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        jumps = itertools.cycle([86400, -86400])
        watch = Supervisor([Child("rank 0", sleeper, tmp_path / "o", tmp_path / "e")], 1.0, lambda child, event: None)
        began = time.monotonic()
        with pytest.raises(Exception, match="rank 0 has been silent for 1 s"):
            watch.wait(lambda: set_clock(next(jumps)))
        assert 1 <= time.monotonic() - began < 5
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_pipeline_runs_and_is_reused_across_jumps(tmp_path, monkeypatch):
    from datetime import UTC, datetime, timedelta

    from ftpipe.pipeline import events, runner, spec
    from tests import kinds

    kinds.install(monkeypatch)
    jumps = itertools.cycle([0, 40 * 86400, -86400, 3600, -3 * 86400])

    class Jumping(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz or UTC) + timedelta(seconds=next(jumps))

    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    for module in (runner, events):
        monkeypatch.setattr(module, "datetime", Jumping)
    (tmp_path / "numbers.txt").write_text("1\n2\n3\n")
    path = Path(tmp_path / "pipeline.yaml")
    path.write_text("name: clock\nworkspace: %s\nstages:\n  numbers: {path: numbers.txt}\n  total: {kind: sum, of: [numbers]}\n" % (tmp_path / "work"))
    first = runner.run(spec.load(path))
    assert [s["state"] for s in first.record["stages"].values()] == ["built", "built"] and all(s["seconds"] >= 0 for s in first.record["stages"].values())
    assert [s["state"] for s in runner.run(spec.load(path)).record["stages"].values()] == ["reused", "reused"]
