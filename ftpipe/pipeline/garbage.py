"""What a workspace can do without: artifacts that nothing refers to any more, and what killed stages left."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ftpipe.artifacts import Artifact
from ftpipe.errors import ArtifactError
from ftpipe.pipeline.runner import runs
from ftpipe.pipeline.store import Store
from ftpipe.stages.base import Environment


@dataclass(frozen=True)
class Garbage:
    """A folder that can go: its size in bytes, why it can, and the key that must not be in work while it goes."""

    path: Path
    bytes: int
    reason: str
    key: str = ""


def find(workspace: Path, *, days: float = 7.0) -> list[Garbage]:
    """What nothing refers to and nothing has touched for `days` days, the largest first.

    Kept are: the artifacts that each pipeline's stages last had, those of runs that are running, those behind every registered version (whatever its
    aliases), and everything any of them was made of. So no lineage is torn, and an unchanged pipeline still has nothing to do.
    """
    store, limit = Store(workspace), time.time() - days * 86400
    needed = _needed(store)
    found = [Garbage(a.path, used(a.path), "no pipeline, run or version refers to it", a.key) for a in store.all() if a.key not in needed]
    left = "left by a stage that did not finish"
    found += [Garbage(p, used(p), left, p.name.rpartition("-")[2]) for p in _folders(workspace / "work")]
    found += [Garbage(p, used(p), "an altered artifact, set aside") for p in _folders(workspace / "quarantine")]
    return sorted((g for g in found if _touched(g.path) < limit), key=lambda g: (-g.bytes, g.path))


def remove(workspace: Path, garbage: Iterable[Garbage]) -> int:
    """Remove what `find` found, and return the bytes freed. What another process has taken up since is passed over."""
    store = Store(workspace)
    needed, freed = _needed(store), 0
    for item in garbage:
        (workspace / "locks").mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(workspace / "locks" / f"{item.key[:16] or 'gc'}.lock", timeout=0):
                if item.key in needed or not item.path.exists():
                    continue
                # Renamed first: a reader finds the artifact whole or not at all.
                gone = workspace / "tmp" / f"gone-{item.path.name}-{os.getpid()}-0"
                gone.parent.mkdir(parents=True, exist_ok=True)
                item.path.rename(gone)
                shutil.rmtree(gone)
                freed += item.bytes
        except Timeout:
            continue
    return freed


def of_run(workspace: Path, record: dict[str, Any]) -> dict[str, int]:
    """Bytes of the artifacts that a run built and that are still there, by stage. A reused artifact counts for the run that built it."""
    store, found = Store(workspace), {}
    for name, entry in record["stages"].items():
        artifact = store.find(entry["kind"], entry["key"]) if entry["state"] == "built" else None
        with suppress(ArtifactError):
            if artifact is not None and artifact.manifest["notes"].get("run") == record["id"]:
                found[name] = used(artifact.path)
    return found


def used(folder: Path) -> int:
    """Bytes below a folder, as they lie on the disk; files linked several times count once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for path in folder.rglob("*"):
        try:
            stat = path.lstat()
        except FileNotFoundError:
            continue
        if path.is_file() and not path.is_symlink() and (stat.st_dev, stat.st_ino) not in seen:
            seen.add((stat.st_dev, stat.st_ino))
            total += stat.st_blocks * 512
    return total


def _needed(store: Store) -> set[str]:
    """Keys of everything that something refers to."""
    from ftpipe.registry.ledger import list_models, list_versions

    env = Environment(workspace=store.workspace.absolute(), base=store.workspace.absolute(), pipeline="")
    roots = {a.key for artifacts in store.current().values() for a in artifacts} | _running(store)
    roots |= {key for name in list_models(env) for version in list_versions(env, name) for key in version["stages"].values()}
    needed: set[str] = set()
    for artifact in filter(None, (_get(store, key) for key in roots)):
        needed |= {artifact.key, *_ancestors(store, artifact)}
    return needed


def _ancestors(store: Store, artifact: Artifact) -> set[str]:
    """Keys of all that an artifact was made of, as far as it is still there."""
    found: set[str] = set()
    queue = [artifact]
    while queue:
        for entry in queue.pop().manifest["inputs"].values():
            if entry["key"] not in found:
                found.add(entry["key"])
                if made := _get(store, entry["key"]):
                    queue.append(made)
    return found


def _running(store: Store) -> set[str]:
    """Keys that runs now in progress have built or reused."""
    return {s["key"] for r in runs(store.workspace) if r["state"] == "running" for s in r["stages"].values() if "key" in s}


def _get(store: Store, key: str) -> Artifact | None:
    try:
        return store.get(key)
    except ArtifactError:
        return None


def _folders(parent: Path) -> Iterator[Path]:
    return (p for p in sorted(parent.glob("*")) if p.is_dir())


def _touched(folder: Path) -> float:
    """When something below a folder was last written."""
    return max((p.lstat().st_mtime for p in (folder, *folder.rglob("*")) if p.exists()), default=0.0)
