"""gc removes what nothing refers to, and only that."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ftpipe.pipeline import garbage, runner, spec
from ftpipe.pipeline.store import Store

YEAR = 365 * 86400


def age(folder: Path) -> None:
    """Make everything a year old."""
    for path in (folder, *folder.rglob("*")):
        stat = path.stat()
        os.utime(path, (stat.st_atime - YEAR, stat.st_mtime - YEAR))


@pytest.fixture
def workspace(project: Path) -> Path:
    """A pipeline that ran with a threshold of 4, then with one of 10: the first `big` and what was made of it nothing refers to any more."""
    runner.run(spec.load("pipeline.yaml"))
    runner.run(spec.load("pipeline.yaml", overrides={"stages.big.threshold": 10}))
    return project / ".ftpipe"


def names(found: list[garbage.Garbage]) -> list[str]:
    return sorted(json.loads((g.path / "manifest.json").read_text())["name"] for g in found)


def test_only_what_no_run_refers_to_goes_and_only_when_it_is_old(workspace):
    assert garbage.find(workspace) == [] and names(garbage.find(workspace, days=0))
    old = names(garbage.find(workspace, days=0))
    assert "numbers" not in old and "big" in old
    age(workspace)
    found = garbage.find(workspace)
    assert names(found) == old and all(g.bytes > 0 for g in found)
    before = len(Store(workspace).all())
    freed = garbage.remove(workspace, found)
    assert freed == sum(g.bytes for g in found) and len(Store(workspace).all()) == before - len(found)
    assert garbage.find(workspace) == [] and not list((workspace / "tmp").glob("gone-*"))
    again = runner.run(spec.load("pipeline.yaml", overrides={"stages.big.threshold": 10}))
    assert {s["state"] for s in again.record["stages"].values()} == {"reused"}


def test_registered_versions_keep_all_they_were_made_of(workspace, monkeypatch):
    from ftpipe.registry import ledger

    age(workspace)
    total = next(g for g in garbage.find(workspace) if "total" in names([g]))
    monkeypatch.setattr(ledger, "list_models", lambda env: ["m"])
    monkeypatch.setattr(ledger, "list_versions", lambda env, name: [{"stages": {"total": total.key}}])
    kept = Store(workspace).get(total.key)
    safe = {kept.key, *(a.key for a in kept.ancestors())}
    assert len(safe) > 2 and not safe & {g.key for g in garbage.find(workspace)}


def test_what_is_being_built_or_was_taken_up_since_stays(workspace):
    age(workspace)
    found = garbage.find(workspace)
    with Store(workspace).lock(found[0].key, lambda: None):
        garbage.remove(workspace, found[:1])
    assert found[0].path.exists()
    runner.run(spec.load("pipeline.yaml"))  # back to the first threshold: its artifacts are wanted again
    assert garbage.remove(workspace, found) == 0


def test_leftovers_of_killed_stages_and_altered_artifacts_are_listed(workspace):
    for place in ("work/train-0123456789abcdef", "quarantine/sum-0-1"):
        (workspace / place).mkdir(parents=True)
        (workspace / place / "x").write_bytes(b"0" * 10_000)
    age(workspace)
    reasons = {g.path.parent.name: g.reason for g in garbage.find(workspace)}
    assert "did not finish" in reasons["work"] and "altered" in reasons["quarantine"]
