"""Running stages: lock, reuse or build, commit; and the record of each run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ftpipe import __version__, secrets
from ftpipe.artifacts import LOG, Artifact
from ftpipe.errors import ArtifactError, ConfigError, FtpipeError
from ftpipe.pipeline.events import Events
from ftpipe.pipeline.plan import Planned, plan_stage, remember
from ftpipe.pipeline.spec import Pipeline
from ftpipe.pipeline.store import Store, write_atomic
from ftpipe.processes import born, lives
from ftpipe.stages.base import Listener, StageContext


@dataclass(frozen=True)
class Selection:
    """Which stages a run touches. Names are full stage names; stages before `start` must exist already."""

    wanted: tuple[str, ...]
    force: frozenset[str] = frozenset()

    @classmethod
    def of(cls, pipeline: Pipeline, *, only: str | None = None, start: str | None = None, to: str | None = None, force: Iterable[str] = ()) -> Selection:
        """From command-line words: `only` this stage, from `start`, up to `to`, and `force` these (or `all`) to run again."""
        wanted = set(pipeline.stages)
        if only:
            wanted = {pipeline.resolve(only)}
        if start:
            wanted &= pipeline.downstream(_first(pipeline, start))
        if to:
            wanted &= pipeline.upstream(pipeline.resolve(to))
        forced = set()
        for name in force:
            forced |= wanted if name == "all" else set(pipeline.groups[name]) if name in pipeline.groups else {pipeline.resolve(name)}
        return cls(tuple(n for n in pipeline.stages if n in wanted), frozenset(forced))


def _first(pipeline: Pipeline, name: str) -> str:
    return pipeline.groups[name][0] if name in pipeline.groups else pipeline.resolve(name)


class Run:
    """One run of a pipeline. `order` holds the stages to go through; call `execute` for each, then `close`.

    The flow, the command line and the tests all use this class, so that they cannot differ.
    """

    def __init__(self, pipeline: Pipeline, *, selection: Selection | None = None, listener: Listener | None = None, run_id: str | None = None):
        self.pipeline = pipeline
        self.store = Store(pipeline.env.workspace)
        self.listener = listener or Listener()
        self.selection = selection or Selection.of(pipeline)
        self.order = list(self.selection.wanted)
        self.id = run_id or f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
        self.artifacts: dict[str, Artifact] = {}
        self.record: dict[str, Any] = {
            "id": self.id, "pipeline": pipeline.name, "source": str(pipeline.source or ""), "started": _now(), "ended": None, "state": "running",
            "version": __version__, "argv": sys.argv, "host": socket.gethostname(), "pid": os.getpid(), "born": born(os.getpid()),
            "user": os.environ.get("USER", ""), "stages": {},
        }
        pipeline.check()
        self.events = Events(pipeline.env.workspace, self.id, pipeline.name)
        self.events("run", state="started", stages=self.order)
        self._save()

    def execute(self, name: str) -> Artifact:
        """Bring one stage up to date and return its artifact. Raises what the stage raises, after recording it."""
        began = time.monotonic()
        self.record |= {"state": "running", "ended": None}  # a second try after a failure that a retry may mend
        try:
            artifact, planned = self._execute(name)
        except BaseException as error:
            secrets.clean(error)
            state = "cancelled" if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "TerminationSignal" else "failed"
            self.record["stages"][name] = {"state": state, "error": str(error) or type(error).__name__, "seconds": round(time.monotonic() - began, 3)}
            self.events("stage", stage=name, **self.record["stages"][name])
            self.close(state)
            self.listener.failed(name, error)
            raise
        self.artifacts[name] = artifact
        self.record["stages"][name] = {"state": "built" if planned.run else "reused", "reason": planned.reason, "key": artifact.key, "kind": artifact.kind,
                                       "seconds": round(time.monotonic() - began, 3)}
        self._save()
        self.events("stage", stage=name, **self.record["stages"][name], counts=artifact.counts)
        self.listener.finished(name, artifact, reused=not planned.run)
        return artifact

    def close(self, state: str = "succeeded") -> None:
        """Write how the run ended."""
        if self.record["state"] == "running":
            self.record |= {"state": state, "ended": _now()}
            self._save()
            self.events("run", state=state)

    def _execute(self, name: str) -> tuple[Artifact, Planned]:
        stage = self.pipeline.stages[name]
        inputs = {ref: self._input(ref, name) for ref in stage.refs()}
        planned = plan_stage(self.pipeline, name, self.store, inputs, force=name in self.selection.force)
        if not planned.run:
            remember(self.store, self.pipeline, planned.artifact)
            return planned.artifact, planned
        with self.store.lock(planned.key, lambda: logging.getLogger("ftpipe").info("%s: another run is building it; waiting", name)):
            again = plan_stage(self.pipeline, name, self.store, inputs, force=name in self.selection.force)
            if not again.run:
                return again.artifact, again
            if again.altered:
                self._set_aside(again)
            for ref, artifact in inputs.items():
                if problem := artifact.problem():
                    raise ArtifactError(f"input {ref} was altered: {problem}", where=str(artifact.path), remedy="run the pipeline again; it is made anew")
            return self._build(name, again, inputs), again

    def _build(self, name: str, planned: Planned, inputs: dict[str, Artifact]) -> Artifact:
        stage, store = self.pipeline.stages[name], self.store
        self.listener.started(name, planned.kind, planned.key)
        self.events("stage", stage=name, state="started", kind=planned.kind, key=planned.key, reason=planned.reason)
        work = store.work(planned.kind, planned.key)
        work.mkdir(parents=True, exist_ok=True)
        began, started = time.monotonic(), _now()
        with store.building(planned.kind, planned.key) as out:
            log_path = self.store.workspace / "logs" / self.id / f"{name.replace('/', '__')}.log"
            log, handler = _stage_log(name, log_path)
            structured = self.events.handler(name)
            log.addHandler(structured)
            ctx = StageContext(name=name, key=planned.key, out=out, work=work, inputs=inputs, env=self.pipeline.env, log=log, listener=self.listener)
            try:
                log.info("%s (%s) starts: %s", name, planned.kind, planned.reason)
                stage.run(ctx)
                _check_counts(name, ctx.counts)
                log.info("%s done in %.1f s", name, time.monotonic() - began)
            finally:
                log.removeHandler(structured)
                log.removeHandler(handler)
                handler.close()
            shutil.copyfile(log_path, out / LOG)
            notes = {"started": started, "seconds": round(time.monotonic() - began, 3), "run": self.id, "host": socket.gethostname()} | ctx.notes
            artifact = store.commit(out, kind=planned.kind, name=name, key=planned.key, material=planned.material,
                                    inputs=inputs, counts=ctx.counts, meta=ctx.meta, notes=notes)
        remember(store, self.pipeline, artifact)
        shutil.rmtree(work, ignore_errors=True)
        return artifact

    def _input(self, ref: str, reader: str) -> Artifact:
        if ref in self.artifacts:
            return self.artifacts[ref]
        inputs = {r: self._input(r, ref) for r in self.pipeline.stages[ref].refs()}
        planned = plan_stage(self.pipeline, ref, self.store, inputs)
        if planned.altered:
            self._set_aside(planned)
        if planned.artifact is None:
            raise ConfigError(f"stage {reader} needs {ref}, which is not up to date ({planned.reason})", remedy=f"run it too: {command(self.pipeline, ref)}")
        self.artifacts[ref] = planned.artifact
        return planned.artifact

    def _set_aside(self, planned: Planned) -> None:
        artifact = self.store.find(planned.kind, planned.key)
        if artifact is not None:
            where = self.store.quarantine(artifact, planned.altered)
            logging.getLogger("ftpipe").warning("%s: %s; the artifact was moved to %s and is made again", planned.name, planned.altered, where)

    def _save(self) -> None:
        write_atomic(self.store.workspace / "runs" / f"{self.id}.json", json.dumps(secrets.hidden(self.record), indent=1))


def run(pipeline: Pipeline, *, selection: Selection | None = None, listener: Listener | None = None) -> Run:
    """Run a pipeline in this process, stage by stage."""
    this = Run(pipeline, selection=selection, listener=listener)
    for name in this.order:
        this.execute(name)
    this.close()
    return this


def runs(workspace: Path) -> list[dict[str, Any]]:
    """The records of past runs, newest first. A run whose process is gone is shown as killed."""
    found = []
    # an id begins with its second; of runs that began in one, the later is the one that was written to last
    for path in sorted((workspace / "runs").glob("*.json"), key=lambda p: (p.name[:15], p.stat().st_mtime_ns), reverse=True):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["state"] == "running" and record["host"] == socket.gethostname() and not lives(record["pid"], record.get("born")):
            record["state"] = "killed"
        found.append(record)
    return found


def log_files(workspace: Path) -> list[tuple[str, str, Path]]:
    """(run id, stage name, path) of every stage's log, newest run first."""
    found = sorted((workspace / "logs").glob("*/*.log"), key=lambda p: (p.parent.name, p.name), reverse=True)
    return [(p.parent.name, p.stem.replace("__", "/"), p) for p in found]


def command(pipeline: Pipeline, stage: str | None = None) -> str:
    """The command line that runs this pipeline, or resumes it at a stage."""
    return f"ftpipe run {pipeline.source or 'CONFIG'}" + (f" --from {stage}" if stage else "")


def _stage_log(name: str, path: Path) -> tuple[logging.Logger, logging.Handler]:
    path.parent.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger(f"ftpipe.stage.{name}")
    log.setLevel(logging.INFO)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(secrets.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    return log, handler


def _check_counts(name: str, counts: dict[str, int]) -> None:
    """Every row that came in was kept or dropped for a reason."""
    if "rows_in" in counts:
        dropped = sum(n for reason, n in counts.items() if reason.startswith("dropped: "))
        if counts["rows_in"] != counts.get("rows_kept", 0) + dropped:
            raise FtpipeError(f"stage {name} lost count of its rows: {counts}", remedy="this is a fault in the stage; please report it")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
