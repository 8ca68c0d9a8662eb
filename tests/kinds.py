"""Kinds of stage for tests of the machinery: they need no model and say what they did.

`install(monkeypatch)` offers them beside the real kinds. Each `count` file in the workspace holds how often a stage really ran.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from ftpipe.errors import ConfigError
from ftpipe.stages.base import Environment, Ref, Stage, StageContext


class NumbersStage(Stage):
    """Numbers from a text file, one a line."""

    method_name = "numbers"
    produces = "rows"
    path: str

    def externals(self, env: Environment) -> dict[str, Any]:
        path = env.path(self.path)
        if not path.exists():
            raise ConfigError("no such file", where=str(path))
        return {"source": path.read_text()}

    def run(self, ctx: StageContext) -> None:
        note(ctx, "numbers")
        import pyarrow as pa

        numbers = [int(n) for n in ctx.env.path(self.path).read_text().split()]
        (ctx.out / "numbers.json").write_text(json.dumps(numbers))
        ctx.decide(pa.table({"row_id": [f"{n:032x}" for n in numbers], "kept": [True] * len(numbers)}))


class AboveStage(Stage):
    """Numbers above a threshold; may wait, fail or fill the disk on the way."""

    method_name = "above"
    produces = "rows"
    rows: Ref
    threshold: int = 0
    wait: str | None = None
    fail: bool = False

    def key_fields(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"wait"})

    def run(self, ctx: StageContext) -> None:
        (ctx.out / "half.json").write_text("[")
        (ctx.work / "partial").write_text("resumable")
        note(ctx, "above")  # last: a test that waits for it may kill this process at once
        if self.fail:
            raise ValueError("planted failure")
        if self.wait:
            deadline = time.monotonic() + 30
            while not (ctx.env.workspace / self.wait).exists() and time.monotonic() < deadline:
                time.sleep(0.02)
        numbers = [n for n in ctx.inputs[self.rows].json("numbers.json") if n > self.threshold]
        (ctx.out / "half.json").unlink()
        (ctx.out / "numbers.json").write_text(json.dumps(numbers))


class SumStage(Stage):
    """Sum of the numbers of several stages."""

    method_name = "sum"
    produces = "report"
    of: list[Ref]

    def run(self, ctx: StageContext) -> None:
        note(ctx, "sum")
        total = sum(sum(ctx.inputs[r].json("numbers.json")) for r in self.of)
        (ctx.out / "sum.json").write_text(json.dumps(total))


class ChainStage(Stage):
    """Several thresholds one after the other, each a stage of its own."""

    method_name = "chain"
    produces = "rows"
    rows: Ref
    thresholds: list[int]

    def expand(self, name: str) -> dict[str, Stage]:
        stages: dict[str, Stage] = {}
        before = self.rows
        for i, threshold in enumerate(self.thresholds):
            stages[f"{name}/{i}"] = AboveStage(rows=before, threshold=threshold)
            before = f"{name}/{i}"
        return stages

    def run(self, ctx: StageContext) -> None:
        raise AssertionError("a chain is expanded before anything runs")


KINDS = {cls.method_name: cls for cls in (NumbersStage, AboveStage, SumStage, ChainStage)}


def install(monkeypatch: Any = None) -> None:
    """Offer these kinds for the length of a test (or of a process, without monkeypatch)."""
    import ftpipe.stages.base as base

    def offered() -> dict[str, Any]:
        return {name: lambda cls=cls: cls for name, cls in KINDS.items()}

    if monkeypatch is None:
        base.extra_methods = offered
    else:
        monkeypatch.setattr(base, "extra_methods", offered, raising=False)


def note(ctx: StageContext, what: str) -> None:
    """Count a real run of a stage."""
    with (ctx.env.workspace / f"count-{what}").open("a") as f:
        f.write(f"{ctx.name} {os.getpid()}\n")


def ran(workspace: Path, what: str) -> int:
    """How often stages of this kind really ran."""
    path = workspace / f"count-{what}"
    return len(path.read_text().splitlines()) if path.exists() else 0
