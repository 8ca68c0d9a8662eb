"""Small stages for tests of what carries stages: they need no model, and do on request what real ones do rarely (fail, hang, spawn).

`install(folder)` makes them known under the entry point group of the slot, as a package outside the project would; with the returned
environment a child process knows them too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from ftpipe.canonical import file_digest
from ftpipe.errors import InfrastructureError, TrainingError
from ftpipe.pipeline.store import write_atomic
from ftpipe.stages.base import Environment, Ref, Stage, StageContext

ROOT = Path(__file__).parent.parent


class PlantedRows(Stage):
    """Keeps the lines of a file that do not start with `#`; those are dropped as comments."""

    method_name: ClassVar[str] = "listed_rows"
    produces: ClassVar[str] = "rows"
    path: str = Field(description="text file")

    def externals(self, env: Environment) -> dict[str, Any]:
        return {"path": file_digest(env.path(self.path))}

    def run(self, ctx: StageContext) -> None:
        import pyarrow as pa

        lines = ctx.env.path(self.path).read_text().splitlines()
        comment = [line.startswith("#") for line in lines]
        ctx.log.info("%d lines, %d comments", len(lines), sum(comment))
        ctx.decide(pa.table({"row_id": [f"r{i}" for i in range(len(lines))], "kept": [not c for c in comment],
                             "reason": pa.array(["comment" if c else None for c in comment], pa.string())}))
        (ctx.out / "lines.json").write_text(json.dumps([line for line in lines if not line.startswith("#")]))


class PlantedTraining(Stage):
    """Counts steps, reporting progress and metrics as training does."""

    method_name: ClassVar[str] = "planted_training"
    produces: ClassVar[str] = "adapter"
    rows: Ref = Field(description="rows")
    steps: int = 5
    pause: float = 0.0
    log_lines: int = 1

    def run(self, ctx: StageContext) -> None:
        for step in range(1, self.steps + 1):
            time.sleep(self.pause)
            for line in range(self.log_lines):
                ctx.log.info("step %d line %d", step, line)
            ctx.progress(step, self.steps, "steps", loss=1 / step)
            ctx.listener.metrics(ctx.name, {"loss": 1 / step, "learning_rate": 0.1}, step)
        (ctx.out / "train.json").write_text(json.dumps({"steps": self.steps}))


class PlantedReport(Stage):
    """Joins other stages and writes a page."""

    method_name: ClassVar[str] = "planted_report"
    produces: ClassVar[str] = "report"
    of: list[Ref] = Field(description="what it tells of")

    def run(self, ctx: StageContext) -> None:
        (ctx.out / "report.html").write_text(f"<h1>{sorted(ctx.inputs)}</h1>")


class PlantedVerdict(Stage):
    """Refuses or lets pass, as it is told."""

    method_name: ClassVar[str] = "planted_verdict"
    produces: ClassVar[str] = "verdict"
    passes: bool = False

    def run(self, ctx: StageContext) -> None:
        (ctx.out / "verdict.json").write_text(json.dumps({"passed": self.passes}))


class PlantedRegistration(Stage):
    """Registers a small adapter drawn from a number, which becomes the champion if there is none."""

    method_name: ClassVar[str] = "planted_registration"
    produces: ClassVar[str] = "version"
    adapter: Ref = Field(description="what comes before")
    draw: int = 1

    def run(self, ctx: StageContext) -> None:
        from tests.registry.helpers import registered

        done = registered(ctx.env, self.draw)
        (ctx.out / "registration.json").write_text(json.dumps({"registered": True, "name": "demo", "version": done.version, "reason": done.reason}))


class Flaky(Stage):
    """Fails `times` times in a way that a retry may mend; the tries are counted in `ctx.work`."""

    method_name: ClassVar[str] = "flaky"
    times: int = 1
    retryable: bool = True

    def run(self, ctx: StageContext) -> None:
        tries = ctx.work / "tries"
        n = int(tries.read_text()) if tries.exists() else 0
        tries.write_text(str(n + 1))
        if n < self.times:
            raise (InfrastructureError if self.retryable else TrainingError)(f"try {n + 1} fails", where="here", remedy="try again")
        (ctx.out / "tries.json").write_text(json.dumps(n + 1))


RANK = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
if sys.argv[1] == "hold":
    from ftpipe.train.lifeline import hold
    hold()
while True:
    time.sleep(1)
"""


class Ranks(Stage):
    """Starts children that ignore SIGTERM and SIGINT under the supervisor of training ranks, and waits for them.

    Two things end them: the supervisor's `finally`, and, where none runs, their tie to the parent. `tied: false` takes the second away,
    so that only a flow that unwinds properly ends them.
    """

    method_name: ClassVar[str] = "ranks"
    number: int = 2
    tied: bool = True

    def run(self, ctx: StageContext) -> None:
        from ftpipe.train.supervise import supervised

        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        commands = {f"rank {r}": ([sys.executable, "-c", RANK, "hold" if self.tied else "loose"], env) for r in range(self.number)}
        try:
            with supervised(commands, folder=ctx.work / "ranks", record=ctx.work / "record.json", timeout=600, hear=lambda child, event: None) as ranks:
                time.sleep(1)
                pids = {"ranks": [c.process.pid for c in ranks.children], "flow": os.getpid(), "parent": os.getppid()}
                write_atomic(ctx.env.workspace / "ranks.json", json.dumps(pids))
                ctx.log.info("%d ranks are up", self.number)
                ranks.wait()
        finally:
            (ctx.env.workspace / "unwound").touch()


KINDS = (PlantedRows, PlantedTraining, PlantedReport, PlantedVerdict, PlantedRegistration, Flaky, Ranks)


def install(folder: Path) -> dict[str, str]:
    """Write a distribution that declares the kinds into `folder`; the environment (PYTHONPATH) under which a process knows them."""
    info = folder / "ftpipe_test_stages-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ftpipe-test-stages\nVersion: 0\n")
    points = "".join(f"{c.method_name} = tests.stages_for_tests:{c.__name__}\n" for c in KINDS)
    (info / "entry_points.txt").write_text(f"[ftpipe.stages]\n{points}")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}


def write_pipeline(folder: Path, stages: dict[str, Any], *, name: str = "small") -> Path:
    """A pipeline file in `folder`, its workspace beside it, and a text file `rows.txt` of four lines, one a comment."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.txt").write_text("a\nb\n# c\nd\n")
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, "workspace": str(folder / "work"), "stages": stages}, sort_keys=False))
    return path


CHAIN = {
    "rows": {"kind": "listed_rows", "path": "rows.txt"},
    "adapter": {"kind": "planted_training", "rows": "rows"},
    "page": {"kind": "planted_report", "of": ["rows", "adapter"]},
}


def alive(pids: list[int]) -> list[int]:
    """Those processes that are there and no zombies."""
    import psutil

    found = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except psutil.NoSuchProcess:
            pass
    return found


def wait_for(condition, timeout: float, every: float = 0.1, what: str = "the condition"):
    """The first true value of `condition()` and after how many seconds it came; fails after `timeout`."""
    began = time.monotonic()
    while time.monotonic() - began < timeout:
        value = condition()
        if value:
            return value, time.monotonic() - began
        time.sleep(every)
    raise AssertionError(f"{what} did not come true within {timeout:.0f} s")


def stop(process: subprocess.Popen, timeout: float = 40) -> None:
    """End a process this test started, politely first."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
