"""Killed with -9 and run again: the same bytes as a run that was never broken. With one rank, `test_chain.py` shows it."""

from __future__ import annotations

import json
import os
import shutil
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


def test_two_ranks_under_stage_three_go_on_as_they_were_and_one_rank_goes_on_in_their_place(tiny_model, tmp_path):
    """One rank is killed, then the parent. Checkpoints hold everything whole and by name; the adapter's start is found from the rows (EVA), on all ranks the
    same, and computed once."""
    import torch

    from ftpipe.errors import InfrastructureError

    settings = COMMON | {"adapt": {"eva": {"r": 4, "rows": 12}}, "heartbeat": 300, "ranks": 2, "zero": 3}
    folder = tmp_path / "killed"

    def shoot(at: int) -> None:
        if at == 3:
            os.kill(json.loads((folder / "work" / "ranks.json").read_text())[1]["pid"], signal.SIGKILL)

    with pytest.raises(InfrastructureError, match="rank 1 was killed by SIGKILL"):
        planted.train(folder, tiny_model, listener=planted.Told(shoot), **settings)
    assert not planted.left(tmp_path)
    kill_at(folder, tiny_model, settings, 6)
    shutil.copytree(folder, tmp_path / "alone")
    told = planted.Told()
    resumed = planted.train(folder, tiny_model, listener=told, **settings)
    assert told.steps[0]["step"] > 4, "it went on from a checkpoint"
    assert planted.payload(resumed) == planted.payload(planted.train(tmp_path / "straight", tiny_model, **settings))
    whole = planted.train(tmp_path / "whole", tiny_model, **settings | {"ranks": 1, "zero": 2})
    alone = planted.train(tmp_path / "alone", tiny_model, **settings | {"ranks": 1, "zero": 0})
    for other in (alone, resumed):
        assert planted.losses(other) == pytest.approx(planted.losses(whole), abs=1e-4)
    a, b = planted.tensors(whole), planted.tensors(resumed)
    assert set(a) == set(b) and all(torch.allclose(a[n], b[n], rtol=1e-2, atol=1e-3) for n in a)
