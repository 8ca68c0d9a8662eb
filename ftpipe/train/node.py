"""`ftpipe node`: a machine that waits for trainings of a workspace it shares, and starts its share of their ranks."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ftpipe.errors import FtpipeError, InfrastructureError
from ftpipe.processes import clean
from ftpipe.train import launch, meeting
from ftpipe.train.claim import claimed, visible
from ftpipe.train.lifeline import Reporter
from ftpipe.train.setup import Job
from ftpipe.train.supervise import Supervisor, supervised

POLL = 0.5
QUIET = 5.0
"""Most seconds between two lines to the machine that runs the pipeline."""


class Stopped(Exception):
    """The machine that runs the pipeline wants no more of this training."""


def serve(workspace: Path, name: str, log: Callable[[str], None], *, rounds: int | None = None) -> None:
    """Take part in the trainings that a workspace offers, one after the other, until interrupted.

    Args:
        workspace: the same folder, under the same path, as on the machine that runs the pipeline.
        name: what this machine is called in messages. log: called with lines. rounds: trainings after which to return.
    """
    seen: set[str] = set()
    clean(_record(workspace, name))
    log(f"{name} waits for trainings of {workspace}")
    while rounds is None or rounds > 0:
        for path in sorted((workspace / meeting.FOLDER).glob("*.json")):
            try:
                offer = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue  # withdrawn a moment ago
            if offer["folder"] in seen:
                continue
            try:
                if _attend(offer, path, workspace, name, seen, log) and rounds is not None:
                    rounds -= 1
            except Exception as error:  # one training that cannot be taken part in is no reason to leave the next ones
                seen.add(offer["folder"])
                log(f"could not take part in a training: {type(error).__name__}: {error}")
        time.sleep(POLL)


def _attend(offer: dict[str, Any], path: Path, workspace: Path, name: str, seen: set[str], log: Callable[[str], None]) -> bool:
    """Answer one offer; whether a training was taken part in."""
    folder, id = Path(offer["folder"]), f"{name}-{os.getpid()}"
    if why := _unfit(offer, workspace):
        seen.add(offer["folder"])
        log(f"refused a training: {why}")
        if folder.is_dir():
            meeting.write(folder / f"refused-{id}.json", {"name": name, "reason": why})
        return False
    with ExitStack() as held:
        alone = offer["device"] == "cuda" and not offer["share_devices"]
        gpus = held.enter_context(claimed(offer["ranks"], visible(launch.devices()), log)) if alone else None
        try:
            door = held.enter_context(socket.create_connection((offer["address"], offer["port"]), timeout=5))
        except OSError as error:
            if path.exists() and (said := f"unreachable {offer['folder']}") not in seen:
                seen.add(said)
                log(f"there is work, but {offer['address']} port {offer['port']} cannot be reached from here ({error}); trying again")
            return False
        seen.add(offer["folder"])
        meeting.write(folder / f"join-{id}.json", {"id": id, "name": name, "address": door.getsockname()[0]})
        job = _settled(offer, folder, path, door)
        place = next((i for i, node in enumerate(job.nodes) if node["id"] == id), None) if job else None
        if job is None or place is None:
            log("a training began without this machine" if job else "a training was called off before it began")
            return False
        log(f"{job.pipeline}: starting {offer['ranks']} of {job.world} ranks")
        how = _take_part(job, place, offer["ranks"], gpus, folder, workspace, name)
        log(f"{job.pipeline}: {how}")
        return True


def _unfit(offer: dict[str, Any], workspace: Path) -> str | None:
    """Why this machine cannot take part, or None."""
    if Path(offer["workspace"]) != workspace or not Path(offer["folder"]).resolve().is_relative_to(workspace.resolve()):
        return f"the workspace is {offer['workspace']} there and {workspace} here; it must be the same folder under the same path"
    mine = meeting.versions()
    if other := [f"{k} is {v} there and {mine.get(k)} here" for k, v in offer["versions"].items() if mine.get(k) != v]:
        return "; ".join(other)
    if offer["device"] == "cuda" and launch.devices() < offer["ranks"]:
        return f"{offer['ranks']} GPUs are wanted, and there are {launch.devices()}"
    return None


def _settled(offer: dict[str, Any], folder: Path, path: Path, door: socket.socket) -> Job | None:
    """The job, once it is settled who takes part; None if it was called off."""
    end, door_shut = time.monotonic() + offer["join"] + 60, False
    door.settimeout(POLL)
    while time.monotonic() < end:
        if (folder / "job.json").exists():
            return Job.read(folder / "job.json")
        if door_shut and not path.exists():
            return None
        try:
            door_shut = not door.recv(1)  # nothing is ever sent: it ends with the meeting, or with the machine that called it
        except TimeoutError:
            continue
        except OSError:
            door_shut = True
        if door_shut:
            end = min(end, time.monotonic() + 60)  # a network file system may show the job late
            time.sleep(POLL)
    return None


def _take_part(job: Job, place: int, ranks: int, gpus: list[str] | None, folder: Path, workspace: Path, name: str) -> str:
    """Run this machine's ranks to the end, tell how it went, and leave none of them. Returns a sentence for the log."""
    report = Reporter(folder / f"node{place}.jsonl")
    commands = launch.commands(job, folder, place, ranks, gpus)
    with supervised(commands, folder=folder / f"node{place}", record=_record(workspace, name), timeout=job.heartbeat, hear=lambda child, event: None,
                    elsewhere={}) as children:
        try:
            children.wait(_Meanwhile(children, folder / "job.json", report))
        except Stopped:
            return "it was stopped there"
        except FtpipeError as error:
            report("failed", kind=type(error).__name__, what=f"on node {meeting.named(job.nodes[place])}: {error.what}", where=error.where, remedy=error.remedy,
                   echo=children.echo)
            return f"it failed: {error.what}"
        except BaseException:
            report("failed", kind=InfrastructureError.__name__, what=f"node {meeting.named(job.nodes[place])} was stopped", where=None,
                   remedy="start `ftpipe node` there again; run again, it resumes from the last checkpoint", echo=False)
            raise
    report("ended")
    return "done"


class _Meanwhile:
    """Called while ranks run: passes on what they do, if they do anything, and stops them when the job is gone."""

    def __init__(self, ranks: Supervisor, job: Path, report: Reporter):
        self.ranks, self.job, self.report = ranks, job, report
        self.looked = self.told = 0.0
        self.said = ""

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self.looked < POLL:
            return
        self.looked = now
        if not self.job.exists():
            raise Stopped
        latest = max(self.ranks.children, key=lambda c: c.heard)
        doing = f"{latest.name}: {latest.doing}"
        if latest.heard > self.told and (doing != self.said or now - self.told > QUIET):
            self.report.alive(doing)
            self.told, self.said = now, doing


def _record(workspace: Path, name: str) -> Path:
    path = workspace / meeting.FOLDER / f".{name}.ranks"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def main(workspace: Path, name: str) -> None:
    """See `serve`; SIGTERM ends it as ctrl-C does."""
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    serve(workspace, name, lambda line: print(line, file=sys.stderr, flush=True))
