"""Several machines train together: how they meet, what is told of one that fails, and what becomes of the others. The ranks are stand-ins here;
real ones on two hosts are in tests/e2e/test_train_hosts.py."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from ftpipe.errors import ConfigError, InfrastructureError, TrainingError
from ftpipe.stages.base import Environment
from ftpipe.train import launch, meeting, node, supervise
from ftpipe.train.meeting import Nodes
from tests.train import planted
from tests.train.small import job as small_job

pytestmark = pytest.mark.timeout(60)


class Machines:
    """This one, which runs the pipeline, and another in a thread, in one workspace."""

    def __init__(self, folder: Path):
        self.workspace, self.work = folder / "workspace", folder / "workspace" / "work" / "train-1"
        self.work.mkdir(parents=True)
        self.said: list[str] = []
        self.heard: list[str] = []
        self.other: threading.Thread | None = None

    def start(self, rounds: int = 1) -> None:
        self.other = threading.Thread(target=node.serve, args=(self.workspace, "other", self.heard.append), kwargs={"rounds": rounds}, daemon=True)
        self.other.start()

    def train(self, acts: dict[str, str] | None = None, **settings) -> None:
        from dataclasses import replace

        job = replace(small_job(self.work / "x"), model=json.dumps(acts or {}), workspace=str(self.workspace), pipeline="demo",
                      checkpoints=str(self.work / "checkpoints"), result=str(self.work / "result"), tokens=str(self.work / "tokens"))
        launch.launch(job, self.work, hear=lambda event: None, log=self.said.append, render=(self.work / "tokens").touch,
                      nodes=Nodes(**{"count": 2, "address": "127.0.0.1", "join": 20} | settings))

    def rank(self, number: int) -> dict:
        return json.loads((self.work / f"rank{number}.json").read_text())

    def ended(self) -> None:
        self.other.join(15)
        assert not self.other.is_alive()
        assert not [p for p in psutil.process_iter(["cmdline"]) if str(self.workspace) in " ".join(p.info["cmdline"] or [])]
        assert not list((self.workspace / "nodes").glob("*.json")), "an offer was left"


@pytest.fixture
def machines(tmp_path, monkeypatch) -> Machines:
    monkeypatch.setattr(launch, "RANK", "tests.train.fake_rank")
    monkeypatch.setattr(node, "POLL", 0.1)
    monkeypatch.setattr(supervise, "TELL", 3.0)
    monkeypatch.setenv("PYTHONPATH", str(planted.ROOT))
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    return Machines(tmp_path)


def test_each_machine_starts_its_ranks_and_all_know_where_to_meet(machines):
    machines.start()
    machines.train()
    machines.ended()
    first, second = machines.rank(0), machines.rank(1)
    assert (first["RANK"], first["LOCAL_RANK"], second["RANK"], second["LOCAL_RANK"]) == ("0", "0", "1", "0")
    assert first["WORLD_SIZE"] == second["WORLD_SIZE"] == "2" and second["LOCAL_WORLD_SIZE"] == "1"
    assert (first["MASTER_ADDR"], first["MASTER_PORT"]) == (second["MASTER_ADDR"], second["MASTER_PORT"]) and int(first["MASTER_PORT"]) > 1023
    assert second["GLOO_SOCKET_IFNAME"] == "lo" and [n["name"] for n in second["nodes"]][1] == "other"
    assert any("node other (127.0.0.1)" in line for line in machines.said) and machines.heard[-1] == "demo: done"


def test_a_rank_killed_on_another_machine_is_named_though_ranks_here_fail_first(machines):
    machines.start()
    with pytest.raises(InfrastructureError, match=r"on node other \(127.0.0.1\): rank 1 was killed by SIGKILL.* while step 4") as caught:
        machines.train({"0": "echo", "1": "die"})
    assert caught.value.retryable
    machines.ended()


def test_an_error_that_would_come_again_arrives_as_what_it_is(machines):
    machines.start()
    with pytest.raises(TrainingError, match=r"on node other \(127.0.0.1\): the loss is nan") as caught:
        machines.train({"0": "wait", "1": "nan"}, least=1)
    assert (caught.value.where, caught.value.remedy) == ("step 4", "lower it")
    machines.ended()


def test_a_machine_that_says_nothing_more_is_named(machines, monkeypatch):
    """Neither its rank nor `ftpipe node` there could tell: both were killed, here the thread's telling."""
    real = node.Reporter.__call__
    monkeypatch.setattr(node.Reporter, "__call__", lambda self, event, **values: None if event == "failed" else real(self, event, **values))
    machines.start()
    with pytest.raises(InfrastructureError, match=r"rank 0 lost its connection while step 4, and nothing more was heard of node other \(127.0.0.1\): gloo"):
        machines.train({"0": "echo", "1": "die"})
    machines.ended()


def test_with_least_it_goes_on_with_the_machines_that_are_left(machines):
    machines.start()  # for one training, so it does not come back
    machines.train({"0": "echo", "1": "die"}, least=1, join=2)
    assert machines.rank(0)["WORLD_SIZE"] == "1" and machines.rank(0)["nodes"] == []
    assert any("killed by SIGKILL" in line and "starting again" in line for line in machines.said)
    assert any("1 of 2 machines came within 2 s" in line for line in machines.said)
    machines.ended()


def test_machines_that_do_not_fit_are_refused_with_the_reason(machines, monkeypatch):
    real, mine = meeting.versions(), threading.current_thread()
    monkeypatch.setattr(meeting, "versions", lambda: real if threading.current_thread() is mine else real | {"torch": "0.1"})
    machines.start(rounds=1)
    with pytest.raises(InfrastructureError, match=r"1 of 2 machines came within 1 s; other refused: torch is .* there and 0.1 here"):
        machines.train(join=1)
    assert node._unfit({"folder": "/x", "workspace": "/elsewhere"}, machines.workspace).startswith("the workspace is /elsewhere there")
    outside = {"folder": "/etc", "workspace": str(machines.workspace)}
    assert "same folder" in node._unfit(outside, machines.workspace), "what to run comes from the workspace alone"


def test_ranks_elsewhere_are_stopped_when_the_run_is(machines):
    machines.start()
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        machines.train({"0": "wait", "1": "wait"})
    machines.ended()
    assert time.monotonic() - began < 15 and machines.heard[-1] == "demo: it was stopped there"


def test_an_address_that_no_other_machine_can_use_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(meeting.socket, "gethostname", lambda: "localhost")
    with pytest.raises(ConfigError, match="at which no other machine reaches this one"):
        meeting.here(Nodes(count=2))
    with pytest.raises(ConfigError, match="has no address"):
        meeting.here(Nodes(count=2, address="no.such.host.invalid"))
    assert meeting.here(Nodes(count=2, address="127.0.0.1")) == "127.0.0.1"
    with pytest.raises(ValueError):
        Nodes(count=2, address="$(reboot)")
    with pytest.raises(ConfigError, match="at least 3 of 2 machines"):
        planted.stage(tmp_path, nodes={"count": 2, "least": 3}).check(Environment(tmp_path, tmp_path, "t"), {})
    assert planted.stage(tmp_path, nodes={"count": 2}).key_fields() == planted.stage(tmp_path).key_fields()
