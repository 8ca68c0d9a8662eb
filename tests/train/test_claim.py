"""One training on a device at a time, across processes; no two wait for each other."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ftpipe.train import claim, launch
from ftpipe.train.claim import claimed, visible
from tests.train.planted import environment

HOLD = "import sys, time\nfrom pathlib import Path\nfrom ftpipe.train.claim import claimed\n" \
       "with claimed(1, ['0', '1'], print, Path(sys.argv[1])) as mine:\n    print(*mine, flush=True)\n    time.sleep(60)\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(claim, "POLL", 0.01)


def test_a_device_that_another_process_holds_is_passed_over_and_free_again_when_it_is_killed(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert other.stdout.readline().split() == ["0"]
        with claimed(1, ["0", "1"], print, tmp_path) as mine:
            assert mine == ["1"]
        said = []
        threading.Timer(0.2, other.kill).start()
        with claimed(2, ["0", "1"], said.append, tmp_path) as mine:
            assert mine == ["0", "1"] and len(said) == 1 and "not free" in said[0]
    finally:
        other.kill()
        other.wait()


def test_those_who_need_several_take_turns(tmp_path):
    """Eight at once, each wanting two of three devices: all get theirs, and no device has two holders."""
    holders: dict[str, int] = {}
    clashes, done = [], []

    def train() -> None:
        with claimed(2, ["a", "b", "GPU-c/1"], lambda text: None, tmp_path) as mine:
            for device in mine:
                holders[device] = holders.get(device, 0) + 1
                clashes.append(holders[device] > 1)
            time.sleep(0.02)
            for device in mine:
                holders[device] -= 1
        done.append(1)

    threads = [threading.Thread(target=train) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(done) == 8 and not any(clashes)


def test_ranks_see_the_devices_that_were_claimed(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    assert visible(2) == ["4", "6"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible(2) == ["0", "1"]
    seen = []
    monkeypatch.setattr(launch, "_run", lambda job, work, gpus, *rest: seen.append(gpus))
    monkeypatch.setattr(launch, "devices", lambda: 2)
    monkeypatch.setattr(claim.tempfile, "gettempdir", lambda: str(tmp_path))

    class Asked:
        device, world, threads, nodes = "cuda", 1, 1, []

    for share in (False, True):
        launch.launch(Asked, Path(tmp_path), hear=None, log=print, render=None, share=share)
    Asked.device = "cpu"
    launch.launch(Asked, Path(tmp_path), hear=None, log=print, render=None)
    assert seen == [["0"], None, None]
    Asked.device = "cuda"
    assert launch.environment(Asked, 0, ["6"])["CUDA_VISIBLE_DEVICES"] == "6" and "CUDA_VISIBLE_DEVICES" not in launch.environment(Asked, 0)
