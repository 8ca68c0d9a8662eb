"""Stands in for `ftpipe.train.rank` where only what surrounds the ranks is tried. `job.model` says what each rank does: {"0": ["echo"], ...}."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from ftpipe.train.lifeline import Reporter, hold

KEPT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")


def main(path: str) -> None:
    hold()
    job, rank, report = json.loads(Path(path).read_text()), os.environ["RANK"], Reporter()
    report.alive("step 4")
    work = Path(job["checkpoints"]).parent
    (work / f"rank{rank}.json").write_text(json.dumps({"pid": os.getpid(), "nodes": job["nodes"], **{k: os.environ.get(k) for k in KEPT}}))
    act = json.loads(job["model"]).get(rank) if len(job["nodes"]) > 1 else None
    if act == "echo":
        while not (work / "broken").exists():
            time.sleep(0.02)
        report("failed", kind="InfrastructureError", what="gloo: connection closed by peer", where=None, remedy=None, echo=True)
        sys.exit(1)
    if act == "die":
        time.sleep(0.3)
        (work / "broken").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "nan":
        report("failed", kind="TrainingError", what="the loss is nan", where="step 4", remedy="lower it", echo=False)
        sys.exit(1)
    if act == "wait":
        time.sleep(60)
    if rank == "0":
        report("done")
        Path(job["result"]).mkdir()


if __name__ == "__main__":
    main(sys.argv[1])
