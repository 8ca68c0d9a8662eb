"""Suites asked without a pipeline: rows and files on the spot, and systems whose answers are scripted."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ftpipe.data.rows import RowSet
from ftpipe.evaluate.suites.base import Given, Suite
from ftpipe.evaluate.systems import System, results
from ftpipe.stages.base import Environment
from tests.artifacts import rows_artifact
from tests.curate.scripted import Scripted


def given(folder: Path, rows: Sequence[dict[str, Any]] = ()) -> Given:
    """Held-out rows and an environment in `folder`."""
    artifact = rows_artifact(folder / "ws", [{"split": "heldout", **r} for r in rows] or [{"format": "text", "text": "x"}])
    return Given(RowSet(artifact), Environment(folder / "ws", folder, "test"), logging.getLogger("test"))


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def scripted(asked: Given, answer: Callable[[str, int], str | None], name: str = "base") -> System:
    """A system that answers the last turn of a conversation by `answer(turn, n)`. `system.script.asked` lists what it was asked."""
    model = Scripted(lambda adapter, conversation, n, seed: answer(conversation[-1]["content"], n))
    system = System(name, {"is": name}, lambda: model("m", asked.env), asked.env.cache / "generations")
    system.script = model  # type: ignore[attr-defined]
    return system


def scores(suite: Suite, system: System, asked: Given, metric: str | None = None) -> dict[str, float]:
    """Score by item id, in the items' order; of the only metric unless one is named."""
    found = {}
    for item, each in results(system, suite, suite.items(asked), asked.env.cache, lambda now: None):
        found |= {i: s.score for i, s in ((item.id, s) for s in each) if metric in (None, s.metric)}
    return found
