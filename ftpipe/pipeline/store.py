"""The store: a folder of immutable artifacts named by their keys, written beside and renamed into place.

    <workspace>/store/<kind>-<first 16 digits of the key>/    finished artifacts
    <workspace>/tmp/                                          artifacts being written, by process
    <workspace>/work/<kind>-<16 digits>/                      what a killed stage left to go on from
    <workspace>/locks/                                        one lock file a key
    <workspace>/quarantine/                                   artifacts that were found altered, kept for a look
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ftpipe.artifacts import LOG, MANIFEST, MANIFEST_VERSION, Artifact, content_of, hash_files
from ftpipe.canonical import digest
from ftpipe.errors import ArtifactError, InfrastructureError


def write_atomic(path: Path, text: str) -> None:
    """Write a small text file so that readers see the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with disk_errors(path):
        try:
            with temporary.open("w", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or failing disk into an error that names the place and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InfrastructureError("the disk is full", where=str(path),
                                      remedy="free some space or move the workspace, then run the same command again; nothing finished is lost") from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise InfrastructureError(f"cannot be written: {error.strerror}", where=str(error.filename or path)) from error
        raise


class Store:
    """Artifacts of one workspace."""

    def __init__(self, workspace: Path):
        self.workspace = workspace

    def folder(self, kind: str, key: str) -> Path:
        return self.workspace / "store" / f"{kind}-{key[:16]}"

    def work(self, kind: str, key: str) -> Path:
        return self.workspace / "work" / f"{kind}-{key[:16]}"

    def get(self, key: str) -> Artifact:
        """The finished artifact with this key or key prefix (8 digits or more). Raises ArtifactError."""
        found = [p for p in (self.workspace / "store").glob(f"*-{key[:16]}*") if (p / MANIFEST).exists()]
        if len(found) != 1:
            raise ArtifactError(f"{'no' if not found else 'more than one'} artifact with key {key}", where=str(self.workspace / "store"),
                                remedy="run the pipeline again; it makes what is missing")
        return Artifact(found[0], self.get)

    def find(self, kind: str, key: str) -> Artifact | None:
        """The finished artifact of this kind and key, or None. It may have been altered since: see `Artifact.problem`."""
        folder = self.folder(kind, key)
        return Artifact(folder, self.get) if (folder / MANIFEST).exists() else None

    def all(self) -> list[Artifact]:
        """Every finished artifact."""
        return [Artifact(p.parent, self.get) for p in sorted((self.workspace / "store").glob(f"*/{MANIFEST}"))]

    def current(self, pipeline: str | None = None) -> dict[str, list[Artifact]]:
        """For each pipeline, the artifact that each stage last had, inputs before what was made of them."""
        found: dict[str, list[Artifact]] = {}
        for path in sorted((self.workspace / "last").glob("*/*.json")):
            if pipeline is None or path.parent.name == pipeline:
                entry = json.loads(path.read_text(encoding="utf-8"))
                artifact = self.find(entry["kind"], entry["key"])
                if artifact:
                    found.setdefault(path.parent.name, []).append(artifact)
        return {name: _ordered(artifacts) for name, artifacts in found.items()}

    @contextmanager
    def lock(self, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the only right to build `key`. Calls `waiting` once if another process has it. A killed holder releases it."""
        folder = self.workspace / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{key[:16]}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def building(self, kind: str, key: str) -> Iterator[Path]:
        """An empty folder to write a payload into; removed if the block fails."""
        out = self.workspace / "tmp" / f"{kind}-{key[:16]}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        with disk_errors(out):
            self._sweep()
            out.mkdir(parents=True)
            try:
                yield out
            finally:
                shutil.rmtree(out, ignore_errors=True)

    def commit(self, out: Path, *, kind: str, name: str, key: str, material: dict[str, Any], inputs: dict[str, Artifact],
               counts: dict[str, int], meta: dict[str, Any], notes: dict[str, Any]) -> Artifact:
        """Finish an artifact: hash its files, write the manifest, make everything durable, rename into place."""
        files = hash_files(out)
        manifest = {
            "manifest_version": MANIFEST_VERSION, "key": key, "kind": kind, "name": name, "content": content_of(files, meta), "material": material,
            "inputs": {ref: {"key": a.key, "content": a.content, "name": a.name, "kind": a.kind} for ref, a in inputs.items()},
            "counts": counts, "meta": meta, "notes": notes, "files": files,
        }
        manifest["checksum"] = digest(manifest)
        (out / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False), encoding="utf-8")
        for path in out.rglob("*"):
            if path.is_file():
                with path.open("rb") as f:
                    os.fsync(f.fileno())
        folder = self.folder(kind, key)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            shutil.rmtree(folder)  # only a forced run gets here, and it holds the key's lock
        out.rename(folder)
        return Artifact(folder, self.get)

    def quarantine(self, artifact: Artifact, reason: str) -> Path:
        """Move an altered artifact out of the way, so that it is made again and can still be looked at."""
        target = self.workspace / "quarantine" / f"{artifact.path.name}-{uuid.uuid4().hex[:6]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        artifact.path.rename(target)
        (target / "QUARANTINE.txt").write_text(reason + "\n", encoding="utf-8")
        return target

    def log_path(self, artifact: Artifact) -> Path:
        return artifact.path / LOG

    def _sweep(self) -> None:
        """Remove half-written artifacts of processes that are gone."""
        import psutil

        for leftover in (self.workspace / "tmp").glob("*-*-*-*"):
            pid = leftover.name.split("-")[-2]
            if pid.isdigit() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(leftover, ignore_errors=True)


def _ordered(artifacts: list[Artifact]) -> list[Artifact]:
    """Inputs before what was made of them."""
    keys = {a.key: a for a in artifacts}
    done: dict[str, Artifact] = {}

    def visit(artifact: Artifact) -> None:
        if artifact.key not in done:
            for entry in artifact.manifest["inputs"].values():
                if entry["key"] in keys:
                    visit(keys[entry["key"]])
            done[artifact.key] = artifact

    for artifact in artifacts:
        visit(artifact)
    return list(done.values())
