"""Killed with -9 and run again: the same bytes as a run that was never broken."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

from tests.train import planted
from tests.train.test_supervise import alive

pytestmark = pytest.mark.e2e
RUN = """
import json, sys
from pathlib import Path
from tests.train import planted
folder, model, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
planted.train(folder, model, listener=planted.Told(lambda step: (folder / 'step').write_text(str(step))), **settings)
"""
COMMON = {"epochs": 3, "checkpoint_every": 2, "adapt": {"lora": {"r": 4, "dropout": 0.2}}}


def start(folder: Path, model: Path, settings: dict) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen([sys.executable, "-c", RUN, str(folder), str(model), json.dumps(settings)], env=planted.environment(),
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def step(folder: Path) -> int:
    try:
        return int((folder / "step").read_text() or 0)
    except (OSError, ValueError):
        return 0


def kill_at(folder: Path, model: Path, settings: dict, when: int) -> list[int]:
    """Start, kill -9 the parent once step `when` was heard of, wait for the ranks to be gone. Returns their ids."""
    parent = start(folder, model, settings)
    deadline = time.monotonic() + 120
    while step(folder) < when and parent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert parent.poll() is None, parent.stderr.read().decode()
    ranks = [e["pid"] for e in json.loads((folder / "work" / "ranks.json").read_text())]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while alive(ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(ranks), "ranks outlived the parent that was killed"
    return ranks


@pytest.fixture(scope="module")
def straight(tiny_model, tmp_path_factory):
    """The context of an unbroken run, by settings; each is made once, since starting ranks is most of what these tests cost."""
    @cache
    def run(settings: str):
        return planted.train(tmp_path_factory.mktemp("straight"), tiny_model, **json.loads(settings))

    return lambda **settings: run(json.dumps(COMMON | settings, sort_keys=True))


def test_a_killed_run_reaches_the_same_bytes(tiny_model, tmp_path, straight):
    settings = COMMON | {"ranks": 1, "zero": 2}
    kill_at(tmp_path / "killed", tiny_model, settings, 5)
    told = planted.Told()
    resumed = planted.train(tmp_path / "killed", tiny_model, listener=told, **settings)
    assert told.steps[0]["step"] > 4, "it went on from a checkpoint"
    assert planted.adapter_hash(resumed) == planted.adapter_hash(straight(ranks=1, zero=2))
    assert planted.payload(resumed) == planted.payload(straight(ranks=1, zero=2))


def test_two_ranks_under_stage_three_go_on_as_they_were_and_one_rank_goes_on_in_their_place(tiny_model, tmp_path, straight):
    """Checkpoints hold everything whole and by name. The adapter's start is found from the rows (EVA): the same on all ranks, and computed once."""
    import torch

    eva = {"adapt": {"eva": {"r": 4, "rows": 12}}, "heartbeat": 300}
    settings = COMMON | eva | {"ranks": 2, "zero": 3}
    kill_at(tmp_path / "killed", tiny_model, settings, 6)
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    resumed = planted.train(tmp_path / "killed", tiny_model, **settings)
    assert planted.payload(resumed) == planted.payload(straight(**eva, ranks=2, zero=3))
    whole = straight(**eva, ranks=1, zero=2)
    alone = planted.train(tmp_path / "alone", tiny_model, **COMMON | eva, ranks=1, zero=0)
    for other in (alone, resumed):
        assert planted.losses(other) == pytest.approx(planted.losses(whole), abs=1e-4)
    a, b = planted.tensors(whole), planted.tensors(resumed)
    assert set(a) == set(b) and all(torch.allclose(a[n], b[n], rtol=1e-2, atol=1e-3) for n in a)


def test_a_rank_killed_is_a_failure_that_says_so_and_the_next_run_goes_on(tiny_model, tmp_path, straight):
    from ftpipe.errors import InfrastructureError

    settings, folder = COMMON | {"ranks": 2, "zero": 2}, tmp_path / "shot"

    def shoot(at: int) -> None:
        if at == 5:
            os.kill(json.loads((folder / "work" / "ranks.json").read_text())[1]["pid"], signal.SIGKILL)

    with pytest.raises(InfrastructureError, match="rank 1 was killed by SIGKILL"):
        planted.train(folder, tiny_model, listener=planted.Told(shoot), **settings)
    assert not planted.left(tmp_path)
    assert planted.payload(planted.train(folder, tiny_model, **settings)) == planted.payload(straight(ranks=2, zero=2))
