"""The parent's side: start processes, hear what they do, and leave none behind, however the watching ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftpipe import errors
from ftpipe.errors import FtpipeError, InfrastructureError
from ftpipe.processes import clean, remember, stop
from ftpipe.train.lifeline import EVENTS, PARENT, PIPE, WHERE

POLL = 0.05
LAST_LINES, FRAMES = 12, 5
STACK, FRAME = "Stack (most recent call first):", "  File "
"""How a process begins to say where it is (see `lifeline.WHERE`), and each line of it."""
COLLECTIVE = "/torch/distributed/"
"""In the path of a process that waits for others, at the top of its stack."""
TELL = 10.0
"""Seconds that another machine has to say what happened there, once a connection to it broke here."""


@dataclass
class Child:
    """One supervised process. `output` holds what it printed, `events` what it reported (see `lifeline.Reporter`).

    Another machine's share of the work has no process here: `process` is None, and how it ended stands in its events (`ended`, `failed`).
    """

    name: str
    process: subprocess.Popen[bytes] | None
    output: Path
    events: Path
    doing: str = "starting"
    heard: float = field(default_factory=time.monotonic)
    failure: dict[str, Any] | None = None
    offset: int = 0
    ended: int | None = None

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs."""
        return self.process.poll() if self.process else self.ended

    def read(self) -> Iterator[dict[str, Any]]:
        """Whole lines reported since the last call."""
        if not self.events.exists():
            return
        with self.events.open("rb") as f:
            f.seek(self.offset)
            for line in f:
                if not line.endswith(b"\n"):
                    break
                self.offset += len(line)
                self.heard = time.monotonic()
                event = json.loads(line)
                if event["event"] in ("ended", "failed") and self.process is None:
                    self.ended = int(event["event"] == "failed")
                yield event

    def last_lines(self) -> str:
        """The end of what it printed."""
        if not self.output.exists():
            return ""
        with self.output.open("rb") as f:
            f.seek(max(0, self.output.stat().st_size - 16384))
            lines = f.read().decode("utf-8", "replace").splitlines()
        return "\n".join(f"    {line[:300]}" for line in [part for part in lines if part.strip()][-LAST_LINES:])

    def stack(self, seconds: float = 1.0) -> list[str]:
        """Where in its program it is, the innermost call first; nothing from a process that cannot answer (stopped, not heard of yet, or elsewhere)."""
        if self.process is None or not self.offset or self.process.poll() is not None:
            return []
        before = self.output.stat().st_size
        self.process.send_signal(WHERE)
        deadline = time.monotonic() + seconds
        found: list[str] = []
        while not found and time.monotonic() < deadline:
            time.sleep(POLL)
            with self.output.open("rb") as f:
                f.seek(before)
                _, _, said = f.read().decode("utf-8", "replace").partition(STACK)
            found = [line.strip() for line in said.splitlines() if line.startswith(FRAME)]
        return found


class Supervisor:
    """Watches children until all have ended well, or one has not."""

    def __init__(self, children: list[Child], timeout: float, hear: Callable[[Child, dict[str, Any]], None], among: bool = False):
        self.children, self.timeout, self.hear, self.among = children, timeout, hear, among
        self.memory_ran_out = out_of_memory_kills()
        self.echo = False
        """Whether what `wait` raised tells only of a connection that another machine broke."""

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Return when every child has ended with status 0. Raises what the first one that failed reported, or InfrastructureError.

        `meanwhile` is called again and again; what it raises ends the waiting.
        """
        while True:
            running = [c for c in self.children if c.status is None]
            for child in self.children:
                self._listen(child)
            if any(c.status for c in self.children):
                raise self._failure(self._all_that_failed())
            if not running:
                return
            meanwhile()
            if time.monotonic() - min(c.heard for c in running) > self.timeout:
                raise self._stuck(running)
            time.sleep(POLL)

    def _stuck(self, running: list[Child]) -> InfrastructureError:
        """Names the child that is stuck. Those that wait for it in a collective operation are silent too, perhaps for longer: where each is tells which."""
        silent = sorted((c for c in running if time.monotonic() - c.heard > self.timeout / 2), key=lambda c: c.heard)
        printed = {c.name: c.last_lines() for c in silent}
        stacks = {c.name: c.stack() for c in silent}
        waiting = [c for c in silent if any(COLLECTIVE in frame for frame in stacks[c.name][:FRAMES])]
        first = next((c for c in silent if c not in waiting), silent[0])
        said = [f"{first.name} has been silent for {self.timeout:g} s; the last it said was: {first.doing}", printed[first.name],
                *(f"    it is at {frame}" for frame in stacks[first.name][:FRAMES])]
        said += [f"{c.name} {'waits for the others' if c in waiting else 'is silent too'}; the last it said was: {c.doing}" for c in silent if c is not first]
        return InfrastructureError("\n".join(filter(None, said)),
                                   remedy="run again, it resumes from the last checkpoint; raise `heartbeat` if one micro-batch takes this long")

    def _all_that_failed(self) -> list[Child]:
        """What fails first makes others fail: let them say so. Where only echoes are heard of what happened on another machine, it has time to tell."""
        time.sleep(0.5)
        end = time.monotonic() + TELL
        while True:
            for child in self.children:
                self._listen(child)
            failed = [c for c in self.children if c.status]
            silent = [c for c in self.children if c.process is None and c.status is None]
            if not silent or time.monotonic() > end or any(not self._echoes(c) for c in failed):
                return failed
            time.sleep(POLL)

    def _echoes(self, child: Child) -> bool:
        """Whether it failed only because something on another machine did: it tells of a broken connection, or NCCL, which watches these, aborted it."""
        return self.among and (child.failure.get("echo", False) if child.failure else child.status == -signal.SIGABRT)

    def _listen(self, child: Child) -> None:
        for event in child.read():
            if event["event"] == "alive":
                child.doing = event["doing"]
            elif event["event"] == "failed":
                child.failure = event
            else:
                self.hear(child, event)

    def _failure(self, failed: list[Child]) -> FtpipeError:
        self.echo = all(self._echoes(c) for c in failed)
        silent = [c.name for c in self.children if c.process is None and c.status is None]
        if self.echo and silent:
            said = failed[0].failure["what"] if failed[0].failure else "it was aborted"
            return InfrastructureError(f"{failed[0].name} lost its connection while {failed[0].doing}, and nothing more was heard of {' and '.join(silent)}: "
                                       f"{said}", remedy="see whether that machine runs and can be reached; run again, it resumes from the last checkpoint")
        failed = [c for c in failed if not self._echoes(c)] or failed
        killed = [c for c in failed if c.status < 0]
        told = sorted((c for c in failed if c.failure and c.failure["kind"]), key=lambda c: c.failure["time"])
        if told and not killed:
            first = told[0]
            cls = getattr(errors, first.failure["kind"])
            return cls(first.failure["what"], where=first.failure["where"], remedy=first.failure["remedy"])
        first = killed[0] if killed else min(failed, key=lambda c: c.failure["time"] if c.failure else 0)
        if killed:
            number = -first.status
            name = signal.Signals(number).name if number in [s.value for s in signal.Signals] else str(number)
            if name == "SIGKILL" and out_of_memory_kills() > self.memory_ran_out:
                return errors.TrainingError(f"{first.name} was killed by the kernel, as memory ran out, while {first.doing}\n{first.last_lines()}".rstrip(),
                                           remedy="lower batch_tokens, or use fewer ranks, `quantize:` or a machine with more memory; it resumes from the "
                                           "last checkpoint")
            hint = " (the kernel does this when memory runs out)" if name == "SIGKILL" else ""
            what = f"{first.name} was killed by {name}{hint} while {first.doing}"
            return InfrastructureError(f"{what}\n{first.last_lines()}".rstrip(), remedy="run again, it resumes from the last checkpoint; lower batch_tokens "
                                       "if memory ran out")
        said = first.failure["what"] if first.failure else f"it ended with status {first.status}"
        return errors.TrainingError(f"{first.name} failed while {first.doing}: {said}\n{first.last_lines()}".rstrip(),
                                    remedy="the stage's log has all of what it printed")


@contextmanager
def supervised(commands: Mapping[str, tuple[Sequence[str], Mapping[str, str]]], *, folder: Path, record: Path, timeout: float,
               hear: Callable[[Child, dict[str, Any]], None], elsewhere: Mapping[str, Path] | None = None) -> Iterator[Supervisor]:
    """Start processes and stop all of them, and whatever they started, when the block is left for any reason.

    Args:
        commands: for each process its argument list and environment.
        folder: new folder for what they print and report.
        record: file that remembers them, so that `clean` finds those a killed parent may have left.
        timeout: seconds of silence after which a process counts as stuck.
        hear: called in this thread with every event a process reports.
        elsewhere: for each other machine that has a share in the work, the file in which it reports as a process does; None if none has.
    """
    clean(record)
    folder.mkdir(parents=True, exist_ok=True)
    end, ours = os.pipe()  # the children read `end`; only this process holds `ours`, and closing it (or dying) is what they wait for
    children: list[Child] = []
    try:
        for name, (argv, env) in commands.items():
            output, events = folder / f"{name.replace(' ', '')}.log", folder / f"{name.replace(' ', '')}.jsonl"
            with output.open("wb") as f:
                process = subprocess.Popen(list(argv), stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=(end,),
                                           env={**env, PIPE: str(end), PARENT: str(os.getpid()), EVENTS: str(events)})
            children.append(Child(name, process, output, events))
            remember(record, {c.name: c.process.pid for c in children if c.process})
        os.close(end)
        end = -1
        children += [Child(name, None, events.with_suffix(".log"), events) for name, events in (elsewhere or {}).items()]
        yield Supervisor(children, timeout, hear, among=elsewhere is not None)
    finally:
        with _undisturbed():
            if end >= 0:
                os.close(end)
            left = stop([c.process for c in children if c.process])
            os.close(ours)
            if not left:
                record.unlink(missing_ok=True)
    if left:
        raise InfrastructureError(f"{len(left)} processes could not be ended: {left}", remedy="end them by hand before training again")


def out_of_memory_kills() -> int:
    """How often the kernel has killed a process since its start because memory ran out; 0 where it does not say."""
    try:
        return next((int(line.split()[1]) for line in Path("/proc/vmstat").read_text().splitlines() if line.startswith("oom_kill ")), 0)
    except (OSError, ValueError):
        return 0


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No second Ctrl-C or SIGTERM breaks off the cleaning up, which ends by itself within seconds."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
