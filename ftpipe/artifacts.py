"""An artifact: an immutable folder that one stage made.

    <key>/
      manifest.json       what made it, from what, counts, timing, and size and SHA-256 of every other file
      log.txt             what the stage logged (not part of the content)
      decisions.parquet   one row per data row and decision, see `DECISIONS`
      ...                 the payload: Parquet, safetensors, JSON, HTML; never pickle

`content` is a hash over the payload's file hashes. Stages downstream depend on it, not on the key, so that a stage that is run
again and comes to the same result does not make them run again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ftpipe.canonical import digest, file_digest
from ftpipe.errors import ArtifactError

MANIFEST = "manifest.json"
LOG = "log.txt"
DECISIONS = "decisions.parquet"
MANIFEST_VERSION = 1


def decisions_schema():
    """Arrow schema of `decisions.parquet`.

    row_id: the row decided on. step: the stage's or step's name. kept: the verdict. reason: a short phrase, always set for a dropped
    row. score: the number the decision rests on, if any. keeper: for a duplicate, the row_id that stays in its place.
    """
    import pyarrow as pa

    return pa.schema([("row_id", pa.string()), ("step", pa.string()), ("kept", pa.bool_()), ("reason", pa.string()),
                      ("score", pa.float64()), ("keeper", pa.string())])


@dataclass(frozen=True)
class Artifact:
    """A finished artifact, read only. `path` is its folder; `load` finds other artifacts of the same store by key."""

    path: Path
    load: Any = field(default=None, repr=False, compare=False)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"the manifest cannot be read: {error}", where=str(self.path)) from error

    @property
    def key(self) -> str:
        return self.manifest["key"]

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def content(self) -> str:
        return self.manifest["content"]

    @property
    def counts(self) -> dict[str, int]:
        return self.manifest["counts"]

    @property
    def meta(self) -> dict[str, Any]:
        return self.manifest["meta"]

    def file(self, name: str) -> Path:
        """Path of a payload file. Raises ArtifactError if this artifact has none of that name."""
        path = self.path / name
        if not path.exists():
            raise ArtifactError(f"artifact {self.name} ({self.kind}) has no {name}", where=str(self.path))
        return path

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def json(self, name: str) -> Any:
        return json.loads(self.file(name).read_text(encoding="utf-8"))

    def inputs(self) -> dict[str, Artifact]:
        """The artifacts that this one was made from, by the name the stage knew them under."""
        return {ref: self.load(entry["key"]) for ref, entry in self.manifest["inputs"].items()}

    def ancestors(self) -> Iterator[Artifact]:
        """This artifact and everything it was made from, each once, nearest first."""
        seen, queue = set(), [self]
        while queue:
            artifact = queue.pop(0)
            if artifact.key not in seen:
                seen.add(artifact.key)
                yield artifact
                queue.extend(artifact.inputs().values())

    def problem(self, *, deep: bool = True) -> str | None:
        """Why this artifact must not be used, or None. `deep` compares hashes, otherwise sizes only."""
        try:
            files = self.manifest["files"]
            rest = {k: v for k, v in self.manifest.items() if k != "checksum"}
            if self.manifest["checksum"] != digest(rest) or not self.path.name.endswith(self.key[:16]):
                return "the manifest is not what was written"
        except ArtifactError as error:
            return error.what
        except (KeyError, TypeError):
            return "the manifest is not what was written"
        for name, entry in files.items():
            path = self.path / name
            if not path.is_file():
                return f"file {name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"file {name} has {path.stat().st_size} bytes, {entry['size']} were written"
            if deep and file_digest(path) != entry["sha256"]:
                return f"file {name} is not what was written (its SHA-256 differs)"
        return None

    def size(self) -> int:
        """Bytes of all payload files."""
        return sum(entry["size"] for entry in self.manifest["files"].values())


def hash_files(folder: Path, skip: Iterable[str] = (MANIFEST, LOG)) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below `folder`, by relative name."""
    skip = set(skip)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {n: {"size": (folder / n).stat().st_size, "sha256": file_digest(folder / n)} for n in names if n not in skip}


def content_of(files: dict[str, dict[str, Any]], meta: dict[str, Any]) -> str:
    """The content hash of a payload: names and hashes of its files and the metadata that readers rely on."""
    return digest({"files": {n: e["sha256"] for n, e in files.items()}, "meta": meta})
