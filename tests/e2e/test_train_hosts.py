"""ZeRO 3 over two hosts: two network namespaces with a cable between them. Killed on one side, cut off, and brought to the end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.flows.real_server import FTPIPE
from tests.train import planted

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
A, B = "10.213.0.1", "10.213.0.2"
SILENCE = 4
RUN = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from ftpipe.errors import FtpipeError
from tests.train import planted

folder, model, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
tries = []
for at, act in json.loads(sys.argv[4]):
    told = {"error": None, "struck": None}

    def heard(step):
        if step == at:
            told["struck"] = time.monotonic()
            if act == "kill":
                os.kill(json.loads((folder / "workspace/nodes/.hostb.ranks").read_text())[0]["pid"], signal.SIGKILL)
            else:
                subprocess.run(act, check=True)

    ctx = planted.context(folder, planted.lessons(), listener=planted.Told(heard))
    ctx.work = ctx.env.workspace / "work" / "train-1"
    ctx.work.mkdir(parents=True, exist_ok=True)
    if at == 0 and act:
        subprocess.run(act, check=True)
    try:
        planted.stage(model, **settings).run(ctx)
    except FtpipeError as error:
        told["error"] = [type(error).__name__, error.what]
    told["losses"] = {s["step"]: s["loss"] for s in ctx.listener.steps}
    told["seconds"] = time.monotonic() - told["struck"] if told["struck"] else None
    end = time.monotonic() + 20
    while planted.left(folder) and time.monotonic() < end:
        time.sleep(0.1)
    told["left"] = planted.left(folder)
    tries.append(told)
print(json.dumps(tries))
"""


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces, joined by a pair of virtual interfaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces are made by root with `ip`, of Debian's package iproute2")
    names = f"ftpipe-a-{os.getpid()}", f"ftpipe-b-{os.getpid()}"
    try:
        done = [ip("netns", "add", name) for name in names]
        done.append(ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1]))
        for name, address in zip(names, (A, B)):
            done += [ip("-n", name, "addr", "add", f"{address}/30", "dev", "cable"), ip("-n", name, "link", "set", "lo", "up"),
                     ip("-n", name, "link", "set", "cable", "up")]
        if failed := [d for d in done if d.returncode]:
            pytest.skip(f"network namespaces cannot be made here: {failed[0].stderr.strip()}")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@contextmanager
def waiting(host: str, workspace: Path, log: Path) -> Iterator[subprocess.Popen]:
    """`ftpipe node` on a host."""
    with log.open("wb") as out:
        process = subprocess.Popen(["ip", "netns", "exec", host, *FTPIPE, "node", "-w", str(workspace), "--name", "hostb"], stdout=out,
                                   stderr=subprocess.STDOUT, env=planted.environment())
    try:
        yield process
    finally:
        process.terminate()
        assert process.wait(20) == 130


def test_two_hosts_under_stage_three(hosts, tiny_model, tmp_path):
    """Three tries of one training, as the flow's retries would make them: a rank is killed on host b, the cable is cut, and nothing happens."""
    folder, (a, b) = tmp_path / "run", hosts
    (folder / "workspace").mkdir(parents=True)
    settings = {"steps": 10, "checkpoint_every": 2, "zero": 3, "ranks": 1, "heartbeat": 120,
                "nodes": {"count": 2, "address": A, "silence": SILENCE, "join": 60}}
    cable = ["ip", "-n", b, "link", "set", "cable"]
    tries = [[3, "kill"], [6, [*cable, "down"]], [0, [*cable, "up"]]]
    command = [sys.executable, "-c", RUN, str(folder), str(tiny_model), json.dumps(settings), json.dumps(tries)]
    with waiting(b, folder / "workspace", tmp_path / "node.log"):
        done = subprocess.run(["ip", "netns", "exec", a, *command], env=planted.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    killed, cut, whole = json.loads(done.stdout.splitlines()[-1])
    assert not killed["left"] and not cut["left"] and not whole["left"] and not planted.left(folder), "ranks were left on a host"

    assert killed["error"][0] == "InfrastructureError" and f"on node hostb ({B}): rank 1 was killed by SIGKILL" in killed["error"][1]
    assert cut["error"][0] == "InfrastructureError" and f"nothing was heard of node hostb ({B}) for {SILENCE} s" in cut["error"][1]
    print(f"killed: an error after {killed['seconds']:.1f} s; cut off: after {cut['seconds']:.1f} s")
    assert killed["seconds"] < 30 and SILENCE <= cut["seconds"] < SILENCE + 30
    assert whole["error"] is None

    steps = [sorted(map(int, told["losses"])) for told in (killed, cut, whole)]
    assert steps[0][0] == 1 and steps[1][0] == 3 and steps[2][0] in (5, 7) and steps[2][-1] == 10, "each went on from the last checkpoint"
    for before, after in ((killed, cut), (cut, whole)):
        assert all(after["losses"].get(step, loss) == loss for step, loss in before["losses"].items()), "a step taken again came to the same"
    assert whole["losses"]["10"] < killed["losses"]["1"] and (folder / "out/adapter/adapter_model.safetensors").is_file()
