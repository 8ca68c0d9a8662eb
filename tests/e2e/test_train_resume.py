"""Killed with -9 and run again: the same bytes as a run that was never broken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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


@pytest.mark.parametrize(("ranks", "zero"), [(1, 2), (2, 2), (2, 3)])
def test_a_killed_run_reaches_the_same_bytes(tiny_model, tmp_path, ranks, zero):
    settings = COMMON | {"ranks": ranks, "zero": zero}
    straight = planted.train(tmp_path / "straight", tiny_model, **settings)
    for when in (3, 6):
        kill_at(tmp_path / "killed", tiny_model, settings, when)
    told = planted.Told()
    resumed = planted.train(tmp_path / "killed", tiny_model, listener=told, **settings)
    assert told.steps[0]["step"] > 3, "it went on from a checkpoint"
    assert planted.adapter_hash(resumed) == planted.adapter_hash(straight)
    assert planted.payload(resumed) == planted.payload(straight)


def test_a_rank_killed_is_a_failure_that_says_so_and_the_next_run_goes_on(tiny_model, tmp_path):
    from ftpipe.errors import InfrastructureError

    settings = COMMON | {"ranks": 2, "zero": 2}
    straight = planted.train(tmp_path / "straight", tiny_model, **settings)

    def shoot(at: int) -> None:
        if at == 5:
            os.kill(json.loads((tmp_path / "shot" / "work" / "ranks.json").read_text())[1]["pid"], signal.SIGKILL)

    with pytest.raises(InfrastructureError, match="rank 1 was killed by SIGKILL"):
        planted.train(tmp_path / "shot", tiny_model, listener=planted.Told(shoot), **settings)
    assert not planted.left(tmp_path)
    assert planted.payload(planted.train(tmp_path / "shot", tiny_model, **settings)) == planted.payload(straight)


def test_another_number_of_ranks_and_stage_goes_on_from_the_same_checkpoint(tiny_model, tmp_path):
    """Checkpoints hold everything whole and by name."""
    straight = planted.train(tmp_path / "straight", tiny_model, **COMMON, ranks=1, zero=0)
    kill_at(tmp_path / "killed", tiny_model, COMMON | {"ranks": 2, "zero": 3}, 6)
    resumed = planted.train(tmp_path / "killed", tiny_model, **COMMON, ranks=1, zero=2)
    assert planted.losses(resumed) == pytest.approx(planted.losses(straight), abs=5e-5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, type("TerminationSignal", (BaseException,), {})])
def test_stopping_the_stage_ends_its_ranks(tiny_model, tmp_path, error):
    def stop(at: int) -> None:
        if at == 3:
            raise error

    began = time.monotonic()
    with pytest.raises(error):
        planted.train(tmp_path, tiny_model, listener=planted.Told(stop), **COMMON, ranks=2)
    assert not planted.left(tmp_path)
    assert time.monotonic() - began < 120


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tiny_model, tmp_path):
    first, second, other = (planted.train(tmp_path / n, tiny_model, seed=s, steps=2, dtype="bfloat16") for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert planted.payload(first) == planted.payload(second)
    assert planted.adapter_hash(other) != planted.adapter_hash(first)
