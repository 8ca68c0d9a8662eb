"""ZeRO 3 over two hosts: two network namespaces with a cable between them. Killed on one side, cut off, and brought to the end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.flows.real_server import FTPIPE
from tests.stages_for_tests import wait_for
from tests.train import planted

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
A, B = "10.213.0.1", "10.213.0.2"
SILENCE = 4
RUN = """
import json, os, signal, subprocess, sys
from pathlib import Path
from ftpipe.errors import FtpipeError
from tests.train import planted
folder, model, settings, (at, act) = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
steps = []

def heard(step):
    steps.append(step)
    if step != at:
        return
    if act == "kill":
        os.kill(json.loads((folder / "workspace/nodes/.hostb.ranks").read_text())[0]["pid"], signal.SIGKILL)
    else:
        subprocess.run(act, check=True)

told = {"error": None}
ctx = planted.context(folder, planted.lessons(), listener=planted.Told(heard))
ctx.work = ctx.env.workspace / "work" / "train-1"
ctx.work.mkdir(parents=True, exist_ok=True)
stage = planted.stage(model, **settings)
try:
    stage.run(ctx)
    told["alone"] = planted.alone(stage, ctx, folder / "alone")
except FtpipeError as error:
    told["error"] = [type(error).__name__, error.what]
(folder / "told.json").write_text(json.dumps(told | {"steps": steps}))
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


def train(host: str, folder: Path, model: Path, settings: dict, at: int = 0, act: list[str] | str = "") -> dict:
    """Run the stage on a host, and do `act` once step `at` was heard of; what came of it."""
    run = subprocess.Popen(["ip", "netns", "exec", host, sys.executable, "-c", RUN, str(folder), str(model), json.dumps(settings), json.dumps([at, act])],
                           env=planted.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, said = run.communicate(timeout=150)
    finally:
        run.kill()
    assert run.returncode == 0, said.decode()
    return json.loads((folder / "told.json").read_text())


def test_two_hosts_under_stage_three(hosts, tiny_model, tmp_path):
    import torch
    from safetensors.torch import load_file

    folder, (a, b) = tmp_path / "run", hosts
    (folder / "workspace").mkdir(parents=True)
    settings = {"steps": 10, "checkpoint_every": 2, "zero": 3, "ranks": 1, "heartbeat": 120,
                "nodes": {"count": 2, "address": A, "silence": SILENCE, "join": 60}}
    with waiting(b, folder / "workspace", tmp_path / "node.log"):
        killed = train(a, folder, tiny_model, settings, at=3, act="kill")
        assert killed["error"][0] == "InfrastructureError" and f"on node hostb ({B}): rank 1 was killed by SIGKILL" in killed["error"][1]
        assert not planted.left(folder)

        began = time.monotonic()
        cut = train(a, folder, tiny_model, settings, at=6, act=["ip", "-n", b, "link", "set", "cable", "down"])
        assert cut["steps"][0] == 3, "it went on from the checkpoint after step 2"
        assert cut["error"][0] == "InfrastructureError" and f"nothing was heard of node hostb ({B}) for {SILENCE} s" in cut["error"][1]
        _, seconds = wait_for(lambda: not planted.left(folder), 20, what="the end of the ranks on both hosts")
        print(f"cut off: the run ended after {time.monotonic() - began:.0f} s from its start, the last rank {seconds:.1f} s later")

        ip("-n", b, "link", "set", "cable", "up")
        done = train(a, folder, tiny_model, settings)
        assert done["error"] is None and done["steps"][0] in (5, 7) and done["steps"][-1] == 10
    assert not planted.left(folder)
    ours, theirs = load_file(folder / "out/adapter/adapter_model.safetensors"), load_file(done["alone"])
    assert set(ours) == set(theirs) and all(torch.allclose(ours[n], theirs[n], rtol=1e-2, atol=1e-3) for n in ours)
    assert any(t.abs().max() > 1e-3 for n, t in ours.items() if "lora_B" in n)
