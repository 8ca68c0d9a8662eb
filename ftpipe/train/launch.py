"""From a job to a result: ranks as supervised processes, what they report passed on, what they leave checked."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import ftpipe
from ftpipe.errors import InfrastructureError
from ftpipe.train import meeting
from ftpipe.train.claim import claimed, visible
from ftpipe.train.setup import Job
from ftpipe.train.supervise import Child, supervised

RANK = "ftpipe.train.rank"
"""The module that is one rank."""


class Enough(Exception):
    """Raised by whoever hears the ranks, when it has heard what it wanted: they are ended, and `launch` returns without a result."""


def devices() -> int:
    """GPUs that this process may use, counted without loading torch: those of CUDA_VISIBLE_DEVICES, else those the driver shows."""
    from importlib.metadata import version

    if version("torch").endswith("+cpu"):
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").is_dir() else 0
    return min(found, len([d for d in visible.split(",") if d.strip() and d.strip() != "-1"])) if visible is not None else found


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(ranks: int) -> int:
    """Threads for each of `ranks` ranks on this machine; OMP_NUM_THREADS lowers it."""
    share = max(1, cores() // ranks)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(asked)) if asked.isdigit() and int(asked) > 0 else share


def launch(job: Job, work: Path, *, hear: Callable[[dict[str, Any]], None], log: Callable[[str], None], render: Callable[[], None],
           share: bool = False, nodes: meeting.Nodes | None = None) -> None:
    """Run the job's ranks to the end (or until `hear` raises `Enough`), or raise what went wrong; no rank is left either way.

    With several machines a failure that may pass starts all of them again, from the last checkpoint, as often as `nodes.least` allows one to be missing.

    Args:
        job: without rendezvous, which is new for each start; `world` is the number of ranks on each machine.
        work: folder that survives a kill.
        hear: called with what rank 0 reports.
        log: called with lines for the stage's log.
        render: makes `job.tokens`; runs while the ranks import their libraries.
        share: do not claim GPUs; others may train on them at the same time.
        nodes: the machines that are to take part beside this one; None for this one alone.
    """
    with ExitStack() as held:
        mine: list[str] | None = None
        if job.device == "cuda" and not share:
            mine = held.enter_context(claimed(job.world, visible(devices()), log))
        for spare in range(nodes.count - (nodes.least or nodes.count) if nodes else 0, -1, -1):
            try:
                return _run(job, work, mine, hear, log, render, nodes, share)
            except InfrastructureError as error:
                if not spare:
                    raise
                log(f"{error.what}\nstarting again from the last checkpoint, with the machines that come")


def _run(job: Job, work: Path, gpus: list[str] | None, hear: Callable[[dict[str, Any]], None], log: Callable[[str], None], render: Callable[[], None],
         nodes: meeting.Nodes | None, share: bool) -> None:
    Path(job.checkpoints).mkdir(parents=True, exist_ok=True)
    for old in work.glob("start-*"):
        shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="start-", dir=work))
    ranks = job.world
    job = _settle(job, folder, work, nodes, share, log) if nodes else replace(job, rendezvous=str(folder / "rendezvous"))
    job.write(folder / "job.json")
    elsewhere = {f"node {meeting.named(n)}": folder / f"node{i}.jsonl" for i, n in enumerate(job.nodes) if i}
    began = time.monotonic()

    def heard(child: Child, event: dict[str, Any]) -> None:
        if child.name == "rank 0":
            hear(event)

    with ExitStack() as held:
        if elsewhere:
            held.callback((folder / "job.json").unlink, missing_ok=True)  # the other machines stop their ranks when it is gone
        ranks = held.enter_context(supervised(commands(job, folder, 0, ranks, gpus), folder=folder, record=work / "ranks.json", timeout=job.heartbeat,
                                              hear=heard, elsewhere=elsewhere or None))
        try:
            log(f"started {job.world} {'ranks' if job.world > 1 else 'rank'} on {job.device}, {job.threads} threads each, ZeRO stage {job.zero}"
                + "".join(f", {n}" for n in elsewhere))
            if not Path(job.tokens).exists():
                render()
            ranks.wait()
        except Enough:
            return
        except BaseException:
            for child in ranks.children:
                if said := child.last_lines():
                    log(f"{child.name} printed last:\n{said}")
            raise
    if not Path(job.result).is_dir():
        raise InfrastructureError("the ranks ended without a result", where=str(work), remedy="run again; if it stays, please report it")
    log(f"ranks ended after {time.monotonic() - began:.1f} s")


def rank_command(rank: int, job: Path) -> list[str]:
    """The argument list of one rank."""
    return [sys.executable, "-m", RANK, str(job)]


def _settle(job: Job, folder: Path, work: Path, nodes: meeting.Nodes, share: bool, log: Callable[[str], None]) -> Job:
    """The job with the machines that came; that of this machine alone if none did and none has to."""
    with meeting.offered(nodes, folder, Path(job.workspace), work.name, ranks=job.world, device=job.device, share_devices=share) as offer:
        came = meeting.gathered(nodes, folder, log)
        if not came:
            return replace(job, rendezvous=str(folder / "rendezvous"))
        own = {"id": "", "name": socket.gethostname(), "address": offer["address"]}
        settled = replace(job, nodes=[own, *came], world=job.world * (1 + len(came)), silence=nodes.silence, join=nodes.join,
                          rendezvous=f"tcp://{offer['address']}:{offer['port']}")
        settled.write(folder / "job.json")  # before the port is let go, which tells those who wait that the meeting is over
        return settled


def commands(job: Job, folder: Path, place: int, ranks: int, gpus: list[str] | None) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Argument lists and environments of one machine's ranks, of which each has `ranks`."""
    return {f"rank {r}": (rank_command(r, folder / "job.json"), environment(job, r, gpus, local=i, place=place))
            for i, r in enumerate(meeting.share(place, ranks))}


def environment(job: Job, rank: int, gpus: list[str] | None = None, *, local: int | None = None, place: int = 0) -> dict[str, str]:
    """The environment of one rank, which sees `gpus` only if they are given. local: its number on its machine. place: its machine's among `job.nodes`."""
    env = dict(os.environ)
    here = str(Path(ftpipe.__file__).parents[1])
    address, _, port = job.rendezvous.removeprefix("tcp://").rpartition(":") if job.nodes else ("127.0.0.1", "", "0")
    env |= {"RANK": str(rank), "LOCAL_RANK": str(rank if local is None else local), "WORLD_SIZE": str(job.world),
            "LOCAL_WORLD_SIZE": str(job.world // (len(job.nodes) or 1)), "MASTER_ADDR": address, "MASTER_PORT": port,
            "OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1", "PYTHONHASHSEED": "0",
            "PYTHONPATH": os.pathsep.join(dict.fromkeys([here, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]))}
    # MKL's float32 products depend on where in memory their operands begin, unless told otherwise, and a resumed run's lie elsewhere.
    env.setdefault("MKL_CBWR", "AUTO,STRICT")
    if job.nodes:
        if name := meeting.interface(job.nodes[place]["address"]):
            env.setdefault("GLOO_SOCKET_IFNAME", name)
            env.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # by its whole name
    elif sys.platform == "linux":
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine; a host name that does not resolve is no obstacle
    if job.device == "cuda":
        env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return env
