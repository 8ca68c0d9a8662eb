"""Children die with whoever watches them, however that ends, and what went wrong is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ftpipe.errors import InfrastructureError, TrainingError
from ftpipe.processes import born, clean
from ftpipe.train.supervise import supervised
from tests.train.planted import environment

HOLD = "import os, signal, subprocess, sys, time; from ftpipe.train.lifeline import hold, Reporter; hold(); report = Reporter(); report.alive('waiting')\n"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); report('up', pid=os.getpid())\n"
SLEEPER = HOLD + DEAF + "time.sleep(600)\n"
# A thread-blocking system call that holds the interpreter: no other Python thread ever runs again.
STUCK = HOLD + DEAF + "import ctypes; ctypes.PyDLL(None).sleep(600)\n"
PARENT_OF_OTHERS = HOLD + DEAF + (
    "a = subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'])\n"
    "report('up', pid=a.pid); time.sleep(600)\n")
WATCH = """
import json, sys
from pathlib import Path
from ftpipe.train.supervise import supervised
from tests.train import test_supervise as t
folder = Path(sys.argv[1])
pids = []
def hear(child, event):
    pids.append(event['pid'])
    (folder / 'pids.json').write_text(json.dumps(pids))
with supervised(t.commands({'rank 0': t.SLEEPER, 'rank 1': t.STUCK, 'rank 2': t.PARENT_OF_OTHERS}), folder=folder / 'run', record=folder / 'ranks.json',
                timeout=60, hear=hear) as ranks:
    ranks.wait()
"""


def commands(scripts: dict[str, str]):
    return {name: ([sys.executable, "-c", code], environment()) for name, code in scripts.items()}


def alive(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except psutil.NoSuchProcess:
            continue
    return found


def wait_until(true, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.05)
    return False


def watch(tmp_path: Path, scripts: dict[str, str], *, timeout: float = 60, act=lambda ranks: ranks.wait()):
    """Supervise scripts; returns the events heard. The processes are gone when this returns or raises."""
    heard: list[dict] = []
    children = []
    try:
        with supervised(commands(scripts), folder=tmp_path / "run", record=tmp_path / "ranks.json", timeout=timeout,
                        hear=lambda child, event: heard.append(event | {"from": child.name})) as ranks:
            children = [c.process.pid for c in ranks.children]
            assert [e["pid"] for e in json.loads((tmp_path / "ranks.json").read_text())] == children
            act(ranks)
    finally:
        assert not alive(children) and not alive([e["pid"] for e in heard if "pid" in e])
        assert not (tmp_path / "ranks.json").exists()
    return heard


def test_children_that_end_well_are_heard_to_the_end(tmp_path):
    heard = watch(tmp_path, {f"rank {i}": HOLD + f"[report('step', n=n) for n in range(50)]; report('rank', n={i})" for i in range(2)})
    assert [e["n"] for e in heard if e["from"] == "rank 1"] == [*range(50), 1]


def test_an_error_of_ours_arrives_as_it_was(tmp_path):
    failing = HOLD + "report('failed', kind='TrainingError', what='the loss is nan', where='step 3', remedy='lower it'); os._exit(1)"
    with pytest.raises(TrainingError) as caught:
        watch(tmp_path, {"rank 0": HOLD + "time.sleep(600)", "rank 1": failing})
    assert (caught.value.what, caught.value.where, caught.value.remedy) == ("the loss is nan", "step 3", "lower it")


def test_the_first_to_fail_is_named_not_those_it_takes_along(tmp_path):
    first = HOLD + "report('failed', kind='', what='ValueError: planted', where=None, remedy=None); print('its last words'); sys.exit(1)"
    second = HOLD + "time.sleep(0.3); report('failed', kind='', what='RuntimeError: connection closed by peer', where=None, remedy=None); sys.exit(1)"
    with pytest.raises(TrainingError, match="rank 1 failed while waiting: ValueError: planted") as caught:
        watch(tmp_path, {"rank 0": second, "rank 1": first})
    assert "its last words" in caught.value.what


def test_a_killed_child_takes_the_others_along_and_may_be_tried_again(tmp_path):
    began = time.monotonic()
    killed = HOLD + "report.alive('step 7'); print('at seven'); sys.stdout.flush(); os.kill(os.getpid(), 9)"
    with pytest.raises(InfrastructureError, match="rank 1 was killed by SIGKILL") as caught:
        watch(tmp_path, {"rank 0": HOLD + "time.sleep(600)", "rank 1": killed})
    assert "while step 7" in caught.value.what and "at seven" in caught.value.what
    assert caught.value.retryable
    assert time.monotonic() - began < 20


def test_a_child_that_memory_ran_out_for_is_not_tried_again(tmp_path, monkeypatch):
    counts = iter([3, 4])
    monkeypatch.setattr("ftpipe.train.supervise.out_of_memory_kills", lambda: next(counts))
    with pytest.raises(TrainingError, match="rank 0 was killed by the kernel, as memory ran out, while step 7") as caught:
        watch(tmp_path, {"rank 0": HOLD + "report.alive('step 7'); os.kill(os.getpid(), 9)"})
    assert not caught.value.retryable and "batch_tokens" in caught.value.remedy


def test_silence_is_a_failure_that_names_the_silent_one(tmp_path):
    busy = HOLD + "\nwhile True: report.alive('counting'); time.sleep(0.1)"
    with pytest.raises(InfrastructureError, match=r"rank 1 has been silent for 2 s; the last it said was: step 4(.|\n)*the last it printed"):
        watch(tmp_path, {"rank 0": busy, "rank 1": HOLD + "report.alive('step 4'); print('the last it printed', flush=True); time.sleep(600)"}, timeout=2)


class Cancelled(BaseException):
    """Stands for Prefect's TerminationSignal, which is no Exception."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, Cancelled])
def test_leaving_for_any_reason_ends_all_even_those_that_ignore_sigterm(tmp_path, error):
    def leave(ranks):
        assert wait_until(lambda: sum(1 for c in ranks.children for e in c.read() if e["event"] == "up") or False)
        time.sleep(0.3)
        raise error

    began = time.monotonic()
    with pytest.raises(error):
        watch(tmp_path, {"rank 0": SLEEPER, "rank 1": STUCK, "rank 2": PARENT_OF_OTHERS}, act=leave)
    assert time.monotonic() - began < 20


def start_watching(tmp_path: Path) -> tuple[subprocess.Popen, list[int]]:
    """A process that watches three children, one of which has a child of its own; the ids of all four."""
    parent = subprocess.Popen([sys.executable, "-c", WATCH, str(tmp_path)], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        pids = tmp_path / "pids.json"
        assert wait_until(lambda: pids.exists() and len(json.loads(pids.read_text() or "[]")) == 4)
        return parent, json.loads(pids.read_text())
    except BaseException:
        parent.kill()
        raise


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_child_outlives_its_parent(tmp_path, number):
    """SIGINT unwinds; SIGTERM and SIGKILL leave no time for it: children then die by themselves."""
    parent, pids = start_watching(tmp_path)
    try:
        assert len(alive(pids)) == 4
        parent.send_signal(number)
        parent.wait(20)
        ranks = [e["pid"] for e in json.loads((tmp_path / "ranks.json").read_text())] if (tmp_path / "ranks.json").exists() else []
        assert wait_until(lambda: not alive(ranks))
        if number == signal.SIGINT:
            assert not alive(pids)
        # What a rank had started itself is found by the next start, through the session of the rank.
        clean(tmp_path / "ranks.json")
        assert not alive(pids)
    finally:
        for pid in alive(pids):
            os.kill(pid, signal.SIGKILL)


def test_what_an_earlier_parent_left_is_ended_before_a_new_start_and_nothing_else(tmp_path):
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        record = [{"name": "rank 0", "pid": orphan.pid, "born": born(orphan.pid)},
                  {"name": "rank 1", "pid": other.pid, "born": born(os.getpid())}]  # its number was given to another
        (tmp_path / "ranks.json").write_text(json.dumps(record))
        assert clean(tmp_path / "ranks.json") == [orphan.pid]
        assert not alive([orphan.pid])
        assert alive([other.pid]) == [other.pid]
    finally:
        for process in (orphan, other):
            process.kill()
            process.wait()
